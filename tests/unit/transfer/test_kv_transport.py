"""Every KvTransport brings exactly the source's bytes, while they are computed, or says why not."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from services.core.block_hash import Compatibility
from services.core.clock import Clock, ManualClock, SystemClock
from services.core.errors import (
    DiptychError,
    Incompatible,
    KvCorrupt,
    KvLinkLost,
    KvSourceLost,
    KvStale,
    LeaseExpired,
    RequestCancelled,
)
from services.transfer import grpc_transport
from services.transfer.destination import Destination
from services.transfer.grpc_transport import GrpcKvTransport, serve_kv
from services.transfer.inline import place_inline
from services.transfer.lease import Lease, LeaseTable
from services.transfer.memory_transport import MemoryKvTransport
from services.transfer.nixl_reader import NixlReader
from services.transfer.nixl_source import NixlSource
from services.transfer.nixl_transport import NixlKvTransport
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import (
    FirstToken,
    KvChunk,
    KvHeader,
    KvSource,
    KvTransport,
    NixlOffer,
    PullOrder,
)
from services.transfer.receive import Received, ReceiveObserver, receive_kv, receive_lent
from services.transfer.server import KvServer
from services.wire.channel import listen, new_server
from tests.support.in_process_engine import compatibility, geometry

BLOCKS, SIZE, TOKENS, EPOCH = 16, 4, 22, 77
TABLE = [9, 3, 12, 0, 7, 5]  # of the source; 22 tokens fill five blocks and half of the sixth


def pool(block_size: int = SIZE) -> PoolMemory:
    shape = geometry(BLOCKS * SIZE // block_size, block_size)
    return PoolMemory(shape, memoryview(bytearray(shape.shared_bytes)))


def token_bytes(memory: PoolMemory, table: list[int], token: int) -> bytes:
    """The KV of one token, wherever it lies: k, then v, four bytes each (see `geometry`)."""
    block, offset = table[token // memory.block_size], token % memory.block_size
    content = memory.read([block])
    half = memory.block_bytes // 2
    return content[4 * offset : 4 * offset + 4] + content[half + 4 * offset : half + 4 * offset + 4]


class Source:
    """A prefill worker's transfer side, with a pool of recognisable bytes."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.memory = pool()
        self.leases = LeaseTable(
            SystemClock(), 5.0, lambda name, how: self.ends.append(how), self.memory.generation
        )
        for block in range(BLOCKS):
            self.memory.write([block], bytes(range(32 * block % 224, 32 * block % 224 + 32)))
        self.serve()

    def serve(self, nixl: NixlOffer | None = None) -> None:
        self.server = KvServer(
            self.leases, self.memory, compatibility(), EPOCH.__eq__, SystemClock(), 0.2, self._lend, nixl=nixl
        )

    def compute(self, upto: int = TOKENS) -> None:
        lease = self.leases.open("r/0", TOKENS)
        lease.admitted([], cached_tokens=0, queue_ms=0.0)
        lease.advanced(upto, TABLE)
        if upto == TOKENS:
            lease.finished(FirstToken(0, 42, None), 0.0)

    def _lend(self, lease: Lease, token_ids: Sequence[int], salt: str) -> None:
        """What an engine does that has cached all full blocks of a chain, if its salt is the right one."""
        if salt != "known":
            self.leases.fail(lease, KvSourceLost("the prefix is no longer cached here"))
            return
        blocks = len(token_ids) // SIZE
        lease.lent(TABLE[:blocks], blocks * SIZE, 0.0)

    def reuse(self, block: int) -> None:
        """What the engine does when it hands a block out: the lease should make that impossible."""
        self.memory._generations[block] += 1


@asynccontextmanager
async def memory_transport(source: Source, ours: Compatibility) -> AsyncIterator[tuple[KvTransport, str]]:
    yield MemoryKvTransport({"here:1": source.server}, ours), "here:1"


@asynccontextmanager
async def grpc_transport_pair(source: Source, ours: Compatibility) -> AsyncIterator[tuple[KvTransport, str]]:
    server = new_server()
    serve_kv(source.server, server)
    port = listen(server, "127.0.0.1", 0)
    await server.start()
    transport = GrpcKvTransport(ours)
    try:
        yield transport, f"127.0.0.1:{port}"
    finally:
        await transport.close()
        await server.stop(grace=0)


@asynccontextmanager
async def nixl_transport(source: Source, ours: Compatibility) -> AsyncIterator[tuple[KvTransport, str]]:
    """gRPC for the words, one-sided reads for the bytes. Its reader's pool is the next Puller's."""
    pytest.importorskip("nixl")
    nixl_source = NixlSource("p", source.memory)
    source.serve(nixl_source)
    async with grpc_transport_pair(source, ours) as (grpc, address):
        memory = pool(ours.block_size)
        reader = NixlReader("d", memory.pool)
        await reader.start()
        transport = NixlKvTransport(grpc, reader, ["nixl", "grpc"], SystemClock())
        transport.reads_into = memory
        try:
            yield transport, address
        finally:
            await transport.close()
            nixl_source.close()


@pytest.fixture(
    params=[memory_transport, grpc_transport_pair, nixl_transport], ids=["memory", "grpc", "nixl"]
)
def connect(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    return request.param


class Puller:
    def __init__(self, transport: KvTransport, address: str, block_size: int = SIZE) -> None:
        self.transport = transport
        self.source = KvSource("p", address, EPOCH)
        self.memory = getattr(transport, "reads_into", None) or pool(block_size)
        self.table = list(range(self.memory.geometry.blocks))
        self.landed: list[int] = []
        self.proven: list[int] = []
        self.broken: list[DiptychError] = []

    async def receive(
        self,
        held_tokens: int = 0,
        transfer_id: str = "r/0",
        epoch: int = EPOCH,
        clock: Clock = SystemClock(),  # noqa: B008
    ) -> Received:
        destination = Destination(self.memory, self.table, TOKENS, held_tokens)
        source = replace(self.source, epoch=epoch)
        observer = ReceiveObserver(self._on_landed, self.broken.append)
        return await receive_kv(self.transport, source, transfer_id, destination, clock, observer)

    def _on_landed(self, tokens: int, proven: int) -> None:
        self.landed.append(tokens)
        self.proven.append(proven)


async def test_all_blocks_arrive_in_their_places_with_the_first_token(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute()
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        received = await puller.receive()
    assert received.firsts == (FirstToken(0, 42, None),)
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
        assert (await receiving).firsts[0].finish == "stop"


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


@pytest.mark.parametrize("block_size", [1, 2, 8, 16, 64])
async def test_blocks_of_another_size_are_cut_anew(connect, block_size: int) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute()
    async with connect(source, compatibility(block_size)) as link:
        puller = Puller(*link, block_size)
        received = await puller.receive()
    assert received.firsts == (FirstToken(0, 42, None),)
    for token in range(TOKENS):
        expected = token_bytes(source.memory, TABLE, token)
        assert token_bytes(puller.memory, puller.table, token) == expected, token
    assert source.ends == ["released"]


@pytest.mark.parametrize(("block_size", "held"), [(2, 6), (2, 10), (8, 8), (8, 16), (SIZE, 12)])
async def test_what_the_puller_holds_is_not_written_again(connect, block_size: int, held: int) -> None:  # type: ignore[no-untyped-def]
    """Its blocks may be shared with other sequences; source blocks may begin within them."""
    source = Source()
    source.compute()
    async with connect(source, compatibility(block_size)) as link:
        puller = Puller(*link, block_size)
        await puller.receive(held_tokens=held)
    for token in range(TOKENS):
        arrived = token_bytes(puller.memory, puller.table, token)
        assert arrived == (token_bytes(source.memory, TABLE, token) if token >= held else bytes(8)), token


async def test_a_block_that_is_reused_before_it_is_read_ends_the_transfer(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute()
    source.reuse(TABLE[2])
    async with connect(source, compatibility()) as link:
        with pytest.raises(KvStale, match="reused"):
            await Puller(*link).receive()
    assert source.ends == ["stale"]


async def test_a_block_that_is_reused_after_it_was_read_is_not_confirmed(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute(upto=12)
    lease = await source.leases.find("r/0", 0)
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        receiving = asyncio.create_task(puller.receive())
        while not puller.landed or puller.landed[-1] < 12:
            await asyncio.sleep(0.001)
        source.reuse(TABLE[0])
        lease.advanced(TOKENS, TABLE)
        lease.finished(FirstToken(0, 42, None), 0.0)
        with pytest.raises(LeaseExpired):
            await receiving
    assert source.ends == ["stale"]


async def test_inline_kv_is_proven_as_it_lands_and_what_nixl_reads_only_by_the_release(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute()
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        await puller.receive(held_tokens=4)
    assert puller.landed[-1] == TOKENS
    assert set(puller.proven) == {4} if connect is nixl_transport else puller.proven == puller.landed


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


async def test_a_lent_prefix_arrives_and_is_proven_as_a_whole(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        lent = await puller.transport.lend(puller.source, "r/0/prefix", list(range(TOKENS)), "known")
        assert lent == 20
        destination = Destination(puller.memory, puller.table, lent, 8)
        observer = ReceiveObserver(puller._on_landed)
        await receive_lent(
            puller.transport, puller.source, "r/0/prefix", destination, SystemClock(), observer
        )
    assert puller.memory.read(range(6)) == bytes(64) + source.memory.read(TABLE[2:5]) + bytes(32)
    assert (puller.landed[-1], puller.proven[-1]) == (20, 20)
    assert source.ends == ["released"]


async def test_a_lent_prefix_whose_blocks_were_reused_proves_nothing_that_was_read(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        lent = await puller.transport.lend(puller.source, "r/0/prefix", list(range(TOKENS)), "known")

        def reuse_at_the_end(tokens: int, proven: int) -> None:
            puller._on_landed(tokens, proven)
            if tokens == lent:
                source.reuse(TABLE[0])

        with pytest.raises(LeaseExpired):
            await receive_lent(
                *(puller.transport, puller.source, "r/0/prefix"),
                *(Destination(puller.memory, puller.table, lent, 0), SystemClock()),
                ReceiveObserver(reuse_at_the_end),
            )
    assert source.ends == ["stale"]
    if isinstance(puller.transport, NixlKvTransport):
        assert set(puller.proven) == {0}


async def test_a_prefix_that_is_not_cached_is_not_lent(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        with pytest.raises(KvSourceLost, match="no longer cached"):
            await puller.transport.lend(puller.source, "r/0/prefix", [1, 2, 3, 4], "unknown")
    assert source.ends == ["failed"]


async def test_a_loan_is_for_this_incarnation_and_compatible_readers(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    other = Compatibility(model="other", revision="1", block_size=SIZE, layout=compatibility().layout)
    async with connect(source, compatibility()) as link:
        restarted = replace(Puller(*link).source, epoch=EPOCH + 1)
        with pytest.raises(KvSourceLost, match="restarted"):
            await link[0].lend(restarted, "r/0/prefix", [1, 2, 3, 4], "known")
    async with connect(source, other) as link:
        puller = Puller(*link)
        with pytest.raises(Incompatible, match="arithmetic != other"):
            await puller.transport.lend(puller.source, "r/0/prefix", [1, 2, 3, 4], "known")
    assert source.leases.open_leases == 0


class FlippingLink:
    """Flips a bit in the last payload byte of the first `flips` chunks on their way over gRPC."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, flips: int) -> None:
        self.flips = flips
        self._honest = grpc_transport._to_wire
        monkeypatch.setattr(grpc_transport, "_to_wire", self._flip)

    def _flip(self, chunk):  # type: ignore[no-untyped-def]
        message = self._honest(chunk)
        if isinstance(chunk, KvChunk) and chunk.payload and self.flips:
            self.flips -= 1
            message = message[:-1] + bytes([message[-1] ^ 1])
        return message


async def test_a_flipped_bit_on_the_way_is_found_and_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    source.compute()
    FlippingLink(monkeypatch, flips=2)
    async with grpc_transport_pair(source, compatibility()) as link:
        puller = Puller(*link)
        await puller.receive()
    assert [type(error) for error in puller.broken] == [KvCorrupt, KvCorrupt]
    assert puller.memory.read(range(6)) == source.memory.read(TABLE)
    assert source.ends == ["released"]


async def test_a_link_that_always_flips_bits_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    source.compute()
    FlippingLink(monkeypatch, flips=1_000)
    async with grpc_transport_pair(source, compatibility()) as link:
        puller = Puller(*link)
        with pytest.raises(KvCorrupt, match="checksum"):
            await puller.receive()
    assert puller.landed == []
    assert len(puller.broken) == 4


class BreakingTransport(MemoryKvTransport):
    """Its pulls break after so many values each; what is in place stays."""

    breaks: list[int]

    async def pull(self, source, transfer_id, destination, first_token):  # type: ignore[no-untyped-def]
        left = self.breaks.pop(0) if self.breaks else 1_000
        async with aclosing(super().pull(source, transfer_id, destination, first_token)) as arriving:
            async for arrived in arriving:
                if left == 0:
                    raise KvLinkLost("the cable was pulled")
                left -= 1
                yield arrived


async def test_a_pull_that_breaks_goes_on_from_the_token_it_reached() -> None:
    source = Source()
    source.server._blocks_per_chunk = 1
    source.compute()
    transport = BreakingTransport({"here:1": source.server}, compatibility())
    transport.breaks = [2, 0, 1]
    puller = Puller(transport, "here:1")
    received = await puller.receive()
    assert puller.landed == [4, 8, 12, 16, 20, 22, 22]
    assert received.bytes == 6 * source.memory.block_bytes, "a block travelled twice"
    assert len(puller.broken) == 3
    assert puller.memory.read(range(6)) == source.memory.read(TABLE)


async def test_a_pull_is_tried_again_only_until_another_source_is_better() -> None:
    source, clock = Source(), ManualClock()
    source.compute()

    class Slow(BreakingTransport):
        async def pull(self, *order):  # type: ignore[no-untyped-def]
            clock.advance(1.5)
            async with aclosing(super().pull(*order)) as arriving:
                async for arrived in arriving:
                    yield arrived

    transport = Slow({"here:1": source.server}, compatibility())
    transport.breaks = [0] * 9
    puller = Puller(transport, "here:1")
    receiving = asyncio.create_task(puller.receive(clock=clock))
    while not receiving.done():
        await asyncio.sleep(0)
        clock.advance(0.01)
    with pytest.raises(KvLinkLost):
        await receiving
    assert len(puller.broken) == 2, "broke at 1.5 s, at 3 s and at 4.5 s"


async def test_a_pull_of_a_failed_prefill_ends_before_the_next_chunk() -> None:
    source = Source()
    source.server._blocks_per_chunk = 1
    source.compute()
    order = PullOrder(transfer_id="r/0", first_token=0, epoch=EPOCH, compatibility=compatibility())
    async with aclosing(source.server.pull(order)) as messages:
        assert [type(await anext(messages)) for _ in range(2)] == [KvHeader, KvChunk]
        source.leases.fail_all(RequestCancelled("the gateway has gone"))
        with pytest.raises(RequestCancelled):
            await anext(messages)


async def test_an_incarnation_that_has_ended_confirms_nothing(connect) -> None:  # type: ignore[no-untyped-def]
    source = Source()
    source.compute()
    async with connect(source, compatibility()) as link:
        puller = Puller(*link)
        assert not await puller.transport.release(replace(puller.source, epoch=EPOCH - 1), "r/0")
        assert source.ends == []
        assert await puller.transport.release(puller.source, "r/0")


@pytest.mark.parametrize(
    "messages", [[KvChunk(0, 0)], [KvHeader(0)], [KvHeader(SIZE), KvHeader(SIZE)]], ids=str
)
async def test_messages_that_make_no_transfer_are_the_source_s_fault(
    messages: list[KvHeader | KvChunk],
) -> None:
    async def sent() -> AsyncGenerator[KvHeader | KvChunk, None]:
        for message in (*messages, KvChunk(0, SIZE, bytes(SIZE * 8))):
            yield message

    arriving = place_inline(sent(), Destination(pool(), TABLE, TOKENS, 0), 0)
    with pytest.raises(KvCorrupt):
        [arrived async for arrived in arriving]


class BreaksUnproven(BreakingTransport):
    """What it brings before its last break is not proven."""

    async def pull(self, source, transfer_id, destination, first_token):  # type: ignore[no-untyped-def]
        proven = not self.breaks
        async with aclosing(super().pull(source, transfer_id, destination, first_token)) as arriving:
            async for arrived in arriving:
                yield replace(arrived, proven=proven)


async def test_proven_kv_behind_kv_that_is_not_proves_nothing_before_the_confirmation() -> None:
    source = Source()
    source.server._blocks_per_chunk = 1
    source.compute()
    transport = BreaksUnproven({"here:1": source.server}, compatibility())
    transport.breaks = [2]
    puller = Puller(transport, "here:1")
    await puller.receive()
    assert puller.landed == [4, 8, 12, 16, 20, 22, 22]
    assert set(puller.proven) == {0}


async def test_a_source_that_nobody_serves_is_lost() -> None:
    transport = GrpcKvTransport(compatibility())
    with pytest.raises(KvLinkLost):
        await Puller(transport, "127.0.0.1:1").receive()
    await transport.close()
