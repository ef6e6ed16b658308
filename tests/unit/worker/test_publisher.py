"""The index follows the cache, also across an index that was away, is full, or lost everything."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.block_hash import ChainLink, Compatibility
from services.core.clock import SystemClock
from services.core.errors import StoreUnavailable
from services.core.worker_report import WorkerKey, WorkerReport
from services.engine.incarnation import Incarnation
from services.index.memory_index import MemoryPrefixIndex
from services.index.protocol import DEAD_AFTER_S, PrefixIndex
from services.index.redis_index import RedisPrefixIndex
from services.membership.redis_membership import RedisMembership
from services.store.embedded import EmbeddedValkey
from services.worker.publisher import BATCH_BLOCKS_MAX, IndexPublisher
from tests.sim.loop import LoopClock, VirtualLoop

WORKER = WorkerKey("p", 1)
# Virtual: within it everything that will be published is, and what a worker could not take back is swept.
QUIET_S = DEAD_AFTER_S + 10.0


def chain(length: int, name: int = 0) -> list[ChainLink]:
    hashes = [bytes([name]) + number.to_bytes(7, "big") + bytes(8) for number in range(length)]
    return [ChainLink(h, parent) for h, parent in zip(hashes, [b"", *hashes], strict=False)]


def hashes(links: list[ChainLink]) -> list[bytes]:
    return [link.hash for link in links]


CHAIN = chain(8)


class World:
    """A publisher, its incarnation, and the index that it publishes to."""

    def __init__(self, index: PrefixIndex, clock: Any, blocks_max: int) -> None:
        epochs = iter(range(2, 1_000))
        self.incarnation = Incarnation(WORKER, "prefill", clock, 1e9, lambda: next(epochs))
        self.publisher = IndexPublisher(index, self.incarnation, clock, blocks_max)
        self.index = index

    @asynccontextmanager
    async def running(self) -> AsyncIterator[IndexPublisher]:
        task = asyncio.create_task(self.publisher.run())
        try:
            yield self.publisher
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def become_another(self) -> None:
        self.incarnation._beat_at_s -= 2e9
        assert self.incarnation.beat()
        self.publisher.begin_anew()

    async def shows(self, links: Sequence[ChainLink] = CHAIN) -> int:
        located = await self.index.locate([link.hash for link in links], [self.incarnation.key])
        return located[self.incarnation.key]


class MemoryWorld(World):
    index: MemoryPrefixIndex


def simulate(work: Callable[[MemoryWorld], Coroutine[Any, Any, None]], blocks_max: int = 100) -> None:
    """`work` beside a publisher, on virtual time."""

    async def run(loop: VirtualLoop) -> None:
        clock = LoopClock(loop)
        world = MemoryWorld(MemoryPrefixIndex(clock), clock, blocks_max)
        async with world.running():
            await work(world)

    loop = VirtualLoop(seed=1)
    try:
        loop.run_until_complete(run(loop))
    finally:
        loop.close()


def test_stored_blocks_appear_at_once_and_evicted_ones_go() -> None:
    async def work(world: MemoryWorld) -> None:
        for stored, evicted, expected in (
            (CHAIN[:4], [], 4),
            ([], hashes(CHAIN[2:4]), 2),
            (CHAIN[2:3], [], 3),
        ):
            world.publisher.record(stored, evicted)
            await asyncio.sleep(0.1)
            assert await world.shows() == expected

    simulate(work)


def test_everything_is_published_again_when_the_index_is_back() -> None:
    async def work(world: MemoryWorld) -> None:
        world.publisher.record(CHAIN[:4], [])
        await asyncio.sleep(1)
        world.index.available = False
        world.publisher.record([], [CHAIN[3].hash])
        await asyncio.sleep(10)
        world.index.lose_everything()
        world.index.available = True
        await asyncio.sleep(1)
        assert await world.shows() == 3

    simulate(work)


def test_a_restart_that_no_call_met_is_noticed_by_the_next_change_or_renewal() -> None:
    async def work(world: MemoryWorld) -> None:
        world.publisher.record(CHAIN[:4], [])
        await asyncio.sleep(1)
        world.index.lose_everything()
        world.publisher.record(CHAIN[4:5], [])
        await asyncio.sleep(1)
        assert await world.shows() == 5
        world.index.lose_everything()
        await asyncio.sleep(5.1)
        assert await world.shows() == 5

    simulate(work)


def test_more_than_a_batch_is_published_in_batches_between_which_others_run() -> None:
    class Watched(MemoryPrefixIndex):
        batches: list[int] = []

        async def publish(self, worker: WorkerKey, stored: Sequence[bytes], evicted: Sequence[bytes]) -> bool:
            self.batches.append(len(stored) + len(evicted))
            await asyncio.sleep(0.001)
            return await super().publish(worker, stored, evicted)

    async def work(loop: VirtualLoop) -> None:
        clock = LoopClock(loop)
        world = World(Watched(clock), clock, blocks_max=1_000_000)
        many = chain(5 * BATCH_BLOCKS_MAX + 1)
        async with world.running() as publisher:
            publisher.record(many, [])
            seen = []
            for _ in range(100):
                seen.append(await world.shows(many))
                await asyncio.sleep(0.001)
        assert max(Watched.batches) == BATCH_BLOCKS_MAX
        assert seen == sorted(seen), "what is shown grows from the head of the chain"
        assert len(set(seen)) >= 4
        assert seen[-1] == len(many)

    loop = VirtualLoop(seed=1)
    loop.run_until_complete(work(loop))
    loop.close()


def test_the_entry_goes_with_the_worker() -> None:
    async def work(world: MemoryWorld) -> None:
        world.publisher.record(CHAIN[:4], [])
        await asyncio.sleep(1)
        assert world.index.blocks == 4
        await world.publisher.forget()
        assert world.index.blocks == 0

    simulate(work)


def test_another_incarnation_publishes_all_and_takes_the_old_entry_back() -> None:
    async def work(world: MemoryWorld) -> None:
        world.publisher.record(CHAIN[:4], [])
        await asyncio.sleep(1)
        world.become_another()
        world.publisher.record(CHAIN[4:6], [])
        await asyncio.sleep(1)
        assert await world.shows() == 6
        assert await world.index.locate(hashes(CHAIN), [WORKER]) == {WORKER: 0}
        assert world.index.blocks == 6

    simulate(work)


def test_no_more_than_the_limit_is_shown() -> None:
    async def work(world: MemoryWorld) -> None:
        world.publisher.record(CHAIN, [])
        world.publisher.record(chain(2, name=1), [])
        await asyncio.sleep(1)
        assert (await world.shows(), await world.shows(chain(2, name=1))) == (3, 2)

    simulate(work, blocks_max=5)


def test_a_full_index_is_given_way_to_with_one_warning_and_taken_again_when_there_is_room(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work(world: MemoryWorld) -> None:
        world.index.blocks_max = 40
        with caplog.at_level(logging.WARNING):
            for number in range(16):
                world.publisher.record(chain(5, name=number), [])
                await asyncio.sleep(1)
        assert len(caplog.records) == 1
        assert "publishing again" in caplog.text
        assert 0 < world.index.blocks <= 40
        world.index.blocks_max = None
        await asyncio.sleep(300)
        for number in range(16):
            world.publisher.record(chain(6, name=number), [])
        await asyncio.sleep(1)
        assert world.index.blocks == 16 * 6

    simulate(work, blocks_max=100)


steps = st.one_of(
    st.tuples(st.just("store"), st.integers(0, 2), st.integers(1, 6)),
    st.tuples(st.just("evict"), st.integers(0, 2), st.integers(0, 5)),
    st.tuples(st.just("fault"), st.sampled_from(["lose", "away", "back", "another"]), st.just(0)),
    st.tuples(st.just("wait"), st.just(0), st.sampled_from([0.0, 0.01, 0.03, 0.5, 6.0, 200.0])),
)


@given(st.lists(steps, max_size=25))
def test_after_any_history_the_index_shows_the_cache_and_nothing_else(
    history: list[tuple[str, Any, Any]],
) -> None:
    async def work(world: MemoryWorld) -> None:
        held = dict.fromkeys(range(3), 0)
        for kind, subject, amount in history:
            if kind == "store":
                world.publisher.record(chain(amount, subject)[held[subject] :], [])
                held[subject] = max(held[subject], amount)
            elif kind == "evict":
                gone = hashes(chain(held[subject], subject)[amount:])
                world.publisher.record([], gone[::-1])
                held[subject] = min(held[subject], amount)
            elif kind == "wait":
                await asyncio.sleep(amount)
            elif subject == "lose":
                world.index.lose_everything()
            elif subject == "another":
                world.become_another()
            else:
                world.index.available = subject == "back"
        world.index.available = True
        await asyncio.sleep(QUIET_S)
        for number, length in held.items():
            assert await world.shows(chain(6, number)) == length
        assert world.index.blocks == sum(held.values()), "no orphan, no entry of another incarnation"

    simulate(work)


async def until(condition: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_a_restarted_server_gets_everything_again_once() -> None:
    many = chain(20_000)
    with EmbeddedValkey() as valkey:
        index = RedisPrefixIndex(valkey.url, timeout_s=5.0)
        world = World(index, SystemClock(), blocks_max=1_000_000)

        async def shows_all() -> bool:
            try:
                return await world.shows(many) == len(many)
            except StoreUnavailable:
                return False

        async with world.running() as publisher:
            publisher.record(many, [])
            await until(shows_all)
            os.kill(valkey.pid, signal.SIGKILL)
            valkey.start(port=valkey.port)
            await until(shows_all)
            keys, members = await contents(index)
            assert len(keys) == 2, "the entry, and its shard"
            assert members == len(many) + 1, "the blocks and the mark of a whole entry"
        await index.close()


async def contents(index: RedisPrefixIndex) -> tuple[list[str], int]:
    """All keys of the server, and the members of the worker's entry."""
    async with index._store.client() as client:
        keys = [key.decode() async for key in client.scan_iter("*")]
        return sorted(keys), await client.scard(index._keys(WORKER)[0])


async def test_a_server_without_memory_loses_no_worker_and_ends_up_with_a_smaller_index(
    caplog: pytest.LogCaptureFixture,
) -> None:
    report = WorkerReport(
        worker_id=WORKER.worker_id,
        epoch=WORKER.epoch,
        role="prefill",
        state="ready",
        address="127.0.0.1:1",
        served_model="m",
        compatibility=Compatibility(model="m", revision="r", layout="l"),
        context_tokens_max=1,
    )
    with EmbeddedValkey(flags=["--maxmemory", "6mb"]) as small:
        index = RedisPrefixIndex(small.url, timeout_s=5.0)
        membership = RedisMembership(small.url, timeout_s=5.0)
        world = World(index, SystemClock(), blocks_max=1_000_000)
        first = chain(10, name=200)
        with caplog.at_level(logging.WARNING):
            async with world.running() as publisher:
                for name in range(100):
                    publisher.record(chain(2_000, name), [])
                ended_s = time.monotonic() + 4.0
                while time.monotonic() < ended_s:
                    await membership.announce(report)
                    assert await membership.workers() == [report]
                    await asyncio.sleep(0.05)
                publisher.record(first, [])

                async def shows_first() -> bool:
                    return await world.shows(first) == len(first)

                await until(shows_first)
        warned = [record for record in caplog.records if "prefix index is away" in record.getMessage()]
        assert 1 <= len(warned) <= 3
        assert "raise its maxmemory" in warned[0].getMessage()
        await index.close()
        await membership.close()
