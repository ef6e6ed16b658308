"""The index follows the cache, also across an index that was away or lost everything."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.core.clock import ManualClock, SystemClock
from services.core.worker_report import WorkerKey
from services.engine.incarnation import Incarnation
from services.index.memory_index import MemoryPrefixIndex
from services.worker import publisher as publisher_module
from services.worker.publisher import IndexPublisher

WORKER = WorkerKey("p", 1)
CHAIN = [bytes([n]) * 16 for n in range(8)]


@asynccontextmanager
async def running(
    index: MemoryPrefixIndex, incarnation: Incarnation | None = None
) -> AsyncIterator[IndexPublisher]:
    clock = SystemClock()
    incarnation = incarnation or Incarnation(WORKER, "prefill", clock, lease_s=3600.0)
    publisher = IndexPublisher(index, incarnation, clock)
    task = asyncio.create_task(publisher.run())
    try:
        yield publisher
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await publisher.forget()


async def located(index: MemoryPrefixIndex, expected: int, worker: WorkerKey = WORKER) -> None:
    """Wait until the index shows `expected` leading blocks."""
    async with asyncio.timeout(5):
        while await index.locate(CHAIN, [worker]) != {worker: expected}:
            await asyncio.sleep(0.005)


async def test_stored_blocks_appear_and_evicted_ones_go() -> None:
    index = MemoryPrefixIndex(SystemClock())
    async with running(index) as publisher:
        publisher.record(CHAIN[:4], [])
        await located(index, 4)
        publisher.record([], CHAIN[2:4])
        await located(index, 2)
        publisher.record(CHAIN[2:3], [])
        await located(index, 3)


async def test_a_block_that_comes_and_goes_within_a_batch_is_not_published() -> None:
    index = MemoryPrefixIndex(SystemClock())
    async with running(index) as publisher:
        publisher.record(CHAIN[:3], [])
        publisher.record([], CHAIN[1:3])
        await located(index, 1)


async def test_everything_resident_is_published_again_when_the_index_is_back(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(publisher_module, "_RETRY_S", 0.01)
    monkeypatch.setattr(publisher_module, "_RENEW_S", 0.05)
    index = MemoryPrefixIndex(SystemClock())
    async with running(index) as publisher:
        publisher.record(CHAIN[:4], [])
        await located(index, 4)
        index.available = False
        publisher.record([], CHAIN[3:4])
        await asyncio.sleep(0.1)
        index.lose_everything()
        index.available = True
        await located(index, 3)
        publisher.record(CHAIN[3:6], [])
        await located(index, 6)


async def test_the_entries_go_with_the_worker() -> None:
    index = MemoryPrefixIndex(SystemClock())
    async with running(index) as publisher:
        publisher.record(CHAIN[:4], [])
        await located(index, 4)
    await located(index, 0)


async def test_another_incarnation_publishes_all_that_is_resident_and_takes_the_old_entries_back() -> None:
    index, clock = MemoryPrefixIndex(SystemClock()), ManualClock()
    incarnation = Incarnation(WORKER, "prefill", clock, lease_s=2.0, new_epoch=lambda: 2)
    async with running(index, incarnation) as publisher:
        publisher.record(CHAIN[:4], [])
        await located(index, 4)
        clock.advance(3.0)
        assert incarnation.beat()
        publisher.begin_anew()
        await located(index, 4, incarnation.key)
        await located(index, 0)
        publisher.record(CHAIN[4:6], [])
        await located(index, 6, incarnation.key)
    await located(index, 0, incarnation.key)
