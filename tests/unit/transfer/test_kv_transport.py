"""Every KvTransport brings exactly the source's bytes, while they are computed, or says why not."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from services.core.block_hash import Compatibility
from services.core.clock import SystemClock
from services.core.errors import (
    BadRequest,
    Incompatible,
    KvCorrupt,
    KvSourceLost,
    LeaseExpired,
    RequestCancelled,
)
from services.transfer import grpc_transport
from services.transfer.grpc_transport import GrpcKvTransport, KvTransferService
from services.transfer.lease import LeaseTable
from services.transfer.memory_transport import MemoryKvTransport
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import FirstToken, KvSource, KvTransport
from services.transfer.receive import Destination, Received, receive_kv
from services.transfer.server import KvServer
from services.wire.channel import listen, new_server
from services.wire.generated import transfer_pb2_grpc
from tests.support.in_process_engine import compatibility, geometry

BLOCKS, SIZE, TOKENS, EPOCH = 16, 4, 22, 77
TABLE = [9, 3, 12, 0, 7, 5]  # of the source; 22 tokens fill five blocks and half of the sixth


def pool() -> PoolMemory:
    return PoolMemory(geometry(BLOCKS), memoryview(bytearray(geometry(BLOCKS).bytes)))


class Source:
    """A prefill worker's transfer side, with a pool of recognisable bytes."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.leases = LeaseTable(SystemClock(), 5.0, lambda name, how: self.ends.append(how))
        self.memory = pool()
        for block in range(BLOCKS):
            self.memory.write([block], bytes([block + 1]) * self.memory.block_bytes)
        self.server = KvServer(
            self.leases, self.memory, compatibility(), EPOCH, SystemClock(), pull_wait_s=0.2
        )

    def compute(self, upto: int = TOKENS) -> None:
        lease = self.leases.open("r/0", TOKENS)
        lease.admitted([], cached_tokens=0, queue_ms=0.0)
        lease.advanced(upto, TABLE)
        if upto == TOKENS:
            lease.finished(FirstToken(0, 42, None), 0.0)


@asynccontextmanager
async def memory_transport(source: Source, ours: Compatibility) -> AsyncIterator[tuple[KvTransport, str]]:
    yield MemoryKvTransport({"here:1": source.server}, ours), "here:1"


@asynccontextmanager
async def grpc_transport_pair(source: Source, ours: Compatibility) -> AsyncIterator[tuple[KvTransport, str]]:
    server = new_server()
    transfer_pb2_grpc.add_KvTransferServicer_to_server(KvTransferService(source.server), server)
    port = listen(server, "127.0.0.1", 0)
    await server.start()
    transport = GrpcKvTransport(ours)
    try:
        yield transport, f"127.0.0.1:{port}"
    finally:
        await transport.close()
        await server.stop(grace=0)


@pytest.fixture(params=[memory_transport, grpc_transport_pair], ids=["memory", "grpc"])
def connect(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return request.param


class Puller:
    def __init__(self, transport: KvTransport, address: str) -> None:
        self.transport = transport
        self.source = KvSource("p", address, EPOCH)
        self.memory = pool()
        self.landed: list[int] = []

    async def receive(self, held_tokens: int = 0, transfer_id: str = "r/0", epoch: int = EPOCH) -> Received:
        destination = Destination(self.memory, list(range(6)), TOKENS, held_tokens)
        source = replace(self.source, epoch=epoch)
        return await receive_kv(
            self.transport, source, transfer_id, destination, SystemClock(), self.landed.append
        )


async def test_all_blocks_arrive_in_their_places_with_the_first_token(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute()
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        received = await puller.receive()
    assert received.first == FirstToken(0, 42, None)
    assert puller.memory.read(range(6)) == source.memory.read(TABLE)
    assert received.bytes == 6 * source.memory.block_bytes
    assert puller.landed[-1] == TOKENS
    assert source.ends == ["released"]


async def test_blocks_the_puller_holds_do_not_travel(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute()
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        received = await puller.receive(held_tokens=2 * SIZE)
    assert received.bytes == 4 * source.memory.block_bytes
    assert puller.memory.read([0, 1]) == bytes(2 * source.memory.block_bytes)


async def test_chunks_travel_while_the_prefill_still_computes(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute(upto=0)
    lease = await source.leases.find("r/0", 0)
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        receiving = asyncio.create_task(puller.receive())
        for computed, readable in ((6, 4), (11, 8), (16, 16)):
            lease.advanced(computed, TABLE)
            while not puller.landed or puller.landed[-1] < readable:
                await asyncio.sleep(0.001)
            assert puller.landed[-1] == readable, "a partial block travelled before its end was computed"
        lease.advanced(TOKENS, TABLE)
        lease.finished(FirstToken(0, 42, "stop"), 0.0)
        assert (await receiving).first.finish == "stop"


async def test_a_restarted_source_is_recognised_by_its_epoch(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute()
    async with connect(source, compatibility()) as link:
        with pytest.raises(KvSourceLost, match="restarted"):
            await Puller(*link).receive(epoch=EPOCH + 1)


async def test_an_unknown_transfer_is_refused_after_a_short_wait(connect) -> None:  # type: ignore[no-untyped-def]
    async with connect(Source(), compatibility()) as link:
        with pytest.raises(KvSourceLost, match="no prefill"):
            await Puller(*link).receive(transfer_id="other/0")


async def test_workers_that_differ_are_refused_with_both_values(connect) -> None:  # type: ignore[no-untyped-def]
    ours = Compatibility(model="other", revision="1", block_size=SIZE, layout=compatibility().layout)
    async with connect(Source(), ours) as link:
        with pytest.raises(Incompatible, match="arithmetic != other"):
            await Puller(*link).receive()


async def test_a_lease_that_ends_before_the_confirmation_makes_the_kv_invalid(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute()
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        source.server.release = lambda transfer_id, epoch: False  # type: ignore[method-assign]
        with pytest.raises(LeaseExpired):
            await puller.receive()


async def test_a_prefill_cancelled_under_a_reader_ends_the_pull(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute(upto=8)
    lease = await source.leases.find("r/0", 0)
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        receiving = asyncio.create_task(puller.receive())
        while not puller.landed:
            await asyncio.sleep(0.001)
        source.leases.fail(lease, RequestCancelled("the client is gone"))
        with pytest.raises(RequestCancelled):
            await receiving


async def test_a_pull_must_start_at_a_block(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute()
    async with connect(source, compatibility()) as link:
        with pytest.raises(BadRequest, match="block size"):
            await Puller(*link).receive(held_tokens=3)


async def test_a_cancelled_receive_frees_the_source_at_once(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute(upto=8)
    lease = await source.leases.find("r/0", 0)
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        receiving = asyncio.create_task(puller.receive())
        while not puller.landed:
            await asyncio.sleep(0.001)
        receiving.cancel()
        async with asyncio.timeout(5):
            while lease.holders or not source.ends:
                await asyncio.sleep(0.001)
        assert source.ends == ["failed"], "the source kept the blocks of a reader that has gone"


async def test_a_flipped_bit_on_the_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    source.compute()
    honest = grpc_transport._chunk_to_wire

    def flip(chunk):  # type: ignore[no-untyped-def]
        message = honest(chunk)
        if message.payload:
            message.payload = message.payload[:-1] + bytes([message.payload[-1] ^ 1])
        return message

    monkeypatch.setattr(grpc_transport, "_chunk_to_wire", flip)
    async with grpc_transport_pair(source, compatibility()) as link:
        with pytest.raises(KvCorrupt, match="checksum"):
            await Puller(*link).receive()


async def test_a_source_that_nobody_serves_is_lost() -> None:
    transport = GrpcKvTransport(compatibility())
    with pytest.raises(KvSourceLost):
        await Puller(transport, "127.0.0.1:1").receive()
    await transport.close()
