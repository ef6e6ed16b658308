"""When KV travels over NIXL, when over gRPC instead, and what a failing read leads to."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from services.core.clock import ManualClock
from services.core.errors import Incompatible, KvLinkLost
from services.transfer.grpc_transport import GrpcKvTransport
from services.transfer.nixl_agent import Range
from services.transfer.nixl_reach import Reach
from services.transfer.nixl_reader import RemotePool
from services.transfer.nixl_transport import NixlKvTransport, merge
from services.transfer.protocol import FirstToken, PullOrder
from tests.support.in_process_engine import compatibility
from tests.unit.transfer.test_kv_transport import (
    TABLE,
    TOKENS,
    Puller,
    Source,
    grpc_transport_pair,
    pool,
)

HERE = Reach("this machine", rdma=False)
ELSEWHERE = Reach("another machine", rdma=False)


class PoolOffer:
    """The twin of NixlSource: describes a pool that only MemoryReader can read."""

    def __init__(self, obstacle: str = "", described: bytes = b"") -> None:
        self.pool = described or msgspec.msgpack.encode(RemotePool(b"", 0, 0))
        self._obstacle = obstacle

    def obstacle(self, order: PullOrder) -> str:
        assert order.reach is not None
        return self._obstacle or HERE.obstacle(order.reach)


class MemoryReader:
    """The twin of NixlReader: copies within the process. Its reads fail or wait if they are told to."""

    def __init__(self, source: Source, memory: memoryview) -> None:
        self._source = source
        self._memory = memory
        self.failures = 0
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.reading = asyncio.Event()
        self.reads = 0

    async def read(self, worker_id: str, remote: RemotePool, ranges: list[Range]) -> None:
        self.reads += 1
        self.reading.set()
        await self.goes_on.wait()
        if self.failures:
            self.failures -= 1
            raise KvLinkLost("the cable was pulled")
        for one in ranges:
            theirs = self._source.memory.pool[one.remote : one.remote_end]
            self._memory[one.local : one.local_end] = theirs

    async def close(self) -> None:
        pass


class Link:
    """A source and a reader, connected."""

    def __init__(self, source: Source, grpc: GrpcKvTransport, address: str, transports: list[str]) -> None:
        self.clock = ManualClock()
        memory = pool()
        self.reader = MemoryReader(source, memory.pool)
        transport = NixlKvTransport(grpc, self.reader, transports, self.clock, HERE)  # type: ignore[arg-type]
        transport.reads_into = memory  # type: ignore[attr-defined]
        self.transport, self._address = transport, address

    def puller(self) -> Puller:
        return Puller(self.transport, self._address)


@asynccontextmanager
async def linked(
    source: Source, offer: PoolOffer | None, transports: tuple[str, ...] = ("nixl", "grpc")
) -> AsyncIterator[Link]:
    source.serve(offer)
    async with grpc_transport_pair(source, compatibility()) as (grpc, address):
        assert isinstance(grpc, GrpcKvTransport)
        yield Link(source, grpc, address, list(transports))


def computed() -> Source:
    source = Source()
    source.compute()
    return source


async def test_blocks_are_read_where_both_sides_can() -> None:
    source = computed()
    async with linked(source, PoolOffer()) as link:
        puller = link.puller()
        received = await puller.receive()
    assert link.reader.reads == 1
    assert received.bytes == 6 * source.memory.block_bytes
    assert puller.memory.read(range(6)) == source.memory.read(TABLE)


@pytest.mark.parametrize(
    ("offer", "reason"),
    [(None, "the source does not have it"), (PoolOffer("it rains"), "it rains")],
    ids=["without nixl", "with an obstacle"],
)
async def test_otherwise_payloads_travel_and_the_log_says_why_once(
    offer: PoolOffer | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = computed()
    async with linked(source, offer) as link:
        for _ in range(2):
            puller = link.puller()
            await puller.receive()
            source.compute()
    assert link.reader.reads == 0
    assert puller.proven[-1] == TOKENS
    assert [r.message for r in caplog.records] == [f"KV from p travels over gRPC, not NIXL: {reason}"]


async def test_a_reader_that_prefers_grpc_gets_it() -> None:
    async with linked(computed(), PoolOffer(), ("grpc", "nixl")) as link:
        await link.puller().receive()
    assert link.reader.reads == 0


async def test_a_reader_that_has_nothing_else_is_refused_with_the_reason() -> None:
    async with linked(computed(), PoolOffer("it rains"), ("nixl",)) as link:
        with pytest.raises(Incompatible, match="over any of nixl; nixl: it rains"):
            await link.puller().receive()


async def test_after_a_failed_read_the_transfer_goes_on_over_grpc_and_nixl_gets_another_chance_later() -> (
    None
):
    source = computed()
    async with linked(source, PoolOffer()) as link:
        link.reader.failures = 1
        puller = link.puller()
        await puller.receive()
        assert [str(error) for error in puller.broken] == ["the cable was pulled"]
        assert puller.memory.read(range(6)) == source.memory.read(TABLE)
        source.compute()
        await link.puller().receive()
        assert link.reader.reads == 1, "NIXL was tried again at once"
        link.clock.advance(30.0)
        source.compute()
        await link.puller().receive()
        assert link.reader.reads == 2


async def test_a_pool_that_a_newer_source_describes_in_another_way_is_read_over_grpc() -> None:
    source = computed()
    async with linked(source, PoolOffer(described=b"?")) as link:
        puller = link.puller()
        await puller.receive()
    assert (len(puller.broken), link.reader.reads) == (1, 0)
    assert puller.memory.read(range(6)) == source.memory.read(TABLE)


async def test_what_was_read_before_a_failure_does_not_travel_again() -> None:
    source = Source()
    source.compute(upto=8)
    lease = await source.leases.find("r/0", 0)
    async with linked(source, PoolOffer()) as link:
        puller = link.puller()
        receiving = asyncio.create_task(puller.receive())
        while not puller.landed:
            await asyncio.sleep(0.001)
        link.reader.failures = 1
        lease.advanced(TOKENS, TABLE)
        lease.finished(FirstToken(0, 42, None), 0.0)
        received = await receiving
    assert received.bytes == 6 * source.memory.block_bytes
    assert len(puller.broken) == 1
    assert puller.memory.read(range(6)) == source.memory.read(TABLE)


async def test_a_read_is_given_up_when_the_source_says_that_the_transfer_failed() -> None:
    source = Source()
    source.compute(upto=8)
    lease = await source.leases.find("r/0", 0)
    async with linked(source, PoolOffer()) as link:
        link.reader.goes_on.clear()
        receiving = asyncio.create_task(link.puller().receive())
        await link.reader.reading.wait()
        source.leases.fail(lease, Incompatible("the end"))
        async with asyncio.timeout(5):
            with pytest.raises(Incompatible, match="the end"):
                await receiving


async def test_a_link_that_breaks_beside_a_read_says_nothing_against_reads() -> None:
    source = Source()
    source.compute(upto=8)
    lease = await source.leases.find("r/0", 0)
    async with linked(source, PoolOffer()) as link:
        link.reader.goes_on.clear()
        puller = link.puller()
        receiving = asyncio.create_task(puller.receive())
        await link.reader.reading.wait()
        source.leases.fail(lease, KvLinkLost("the source's own link"))
        async with asyncio.timeout(5):
            with pytest.raises(KvLinkLost, match="own link"):
                await receiving
        assert not link.transport._avoids(puller.source)


async def test_the_exposed_time_includes_the_read_that_the_last_message_waited_for() -> None:
    source = Source()
    source.compute(upto=8)
    lease = await source.leases.find("r/0", 0)
    async with linked(source, PoolOffer()) as link:
        puller = link.puller()
        receiving = asyncio.create_task(puller.receive())
        while not puller.landed:
            await asyncio.sleep(0.001)
        link.reader.reading.clear()
        link.reader.goes_on.clear()
        lease.advanced(TOKENS, TABLE)
        lease.finished(FirstToken(0, 42, None), time.monotonic())
        await link.reader.reading.wait()
        await asyncio.sleep(0.05)  # the last message is here
        link.clock.advance(2.0)
        link.reader.goes_on.set()
        received = await receiving
    assert 2_000 <= received.exposed_ms < 4_000


def test_neighbours_on_both_sides_become_one_range() -> None:
    assert merge([(4, 7), (5, 8), (6, 9), (8, 10), (9, 12)], 10) == [
        Range(remote=40, local=70, bytes=30),
        Range(remote=80, local=100, bytes=10),
        Range(remote=90, local=120, bytes=10),
    ]


def test_reads_reach_the_same_machine_or_over_rdma_and_nothing_else() -> None:
    assert HERE.obstacle(HERE) == ""
    assert "not the same machine" in HERE.obstacle(ELSEWHERE)
    assert Reach("a", rdma=True).obstacle(Reach("b", rdma=True)) == ""
    assert "no RDMA on both sides" in Reach("a", rdma=True).obstacle(Reach("b", rdma=False))
    assert Reach("", rdma=False).obstacle(Reach("", rdma=False)), "an unknown machine is not the same one"
