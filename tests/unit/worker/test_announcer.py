"""A worker is announced at once and again and again, outlives an absent membership, and leaves."""

import asyncio
import time

from services.core.clock import SystemClock
from services.core.worker_report import WorkerReport
from services.membership.memory_membership import MemoryMembership
from services.worker.announcer import Announcer
from tests.support.in_process_engine import compatibility


def report(running: int = 0) -> WorkerReport:
    return WorkerReport(
        worker_id="d",
        epoch=5,
        role="decode",
        state="ready",
        address="127.0.0.1:1",
        served_model="m",
        compatibility=compatibility(),
        context_tokens_max=100,
        running=running,
    )


class Subject:
    def __init__(self) -> None:
        clock = SystemClock()
        self.membership = MemoryMembership(clock)
        self.running = 0
        self.announcer = Announcer(self.membership, lambda: report(self.running), clock)
        self.task = asyncio.create_task(self.announcer.run())

    async def seen(self, running: int) -> None:
        async with asyncio.timeout(5):
            while [one.running for one in await self.membership.workers()] != [running]:
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.announcer.leave()


async def test_a_change_is_announced_and_the_end_too() -> None:
    subject = Subject()
    await subject.seen(0)
    subject.running = 3
    subject.announcer.changed()
    await subject.seen(3)
    await subject.stop()
    assert await subject.membership.workers() == []


async def test_a_report_changes_even_when_nobody_says_so() -> None:
    subject = Subject()
    await subject.seen(0)
    subject.running = 1
    await subject.seen(1)
    await subject.stop()


async def test_a_membership_that_was_away_hears_of_the_worker_again() -> None:
    subject = Subject()
    await subject.seen(0)
    subject.membership.available = False
    await asyncio.sleep(0.05)
    subject.membership.lose_everything()
    subject.membership.available = True
    await subject.seen(0)
    await subject.stop()


async def test_load_that_changes_with_every_step_is_announced_ten_times_a_second() -> None:
    subject = Subject()
    await subject.seen(0)
    (first,) = await subject.membership.workers()
    begun_s = time.monotonic()
    for _ in range(60):
        subject.announcer.load_changed()
        await asyncio.sleep(0.005)
    (last,) = await subject.membership.workers()
    assert 2 <= last.beat - first.beat <= (time.monotonic() - begun_s) / 0.1 + 1
    await subject.stop()
