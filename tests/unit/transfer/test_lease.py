"""Leases fail closed: only a lease that is held or fresh answers "valid", and each ends exactly once."""

import asyncio

import pytest

from services.core.clock import ManualClock
from services.core.errors import KvSourceLost, Overloaded, RequestCancelled, WorkerLost
from services.transfer.lease import ENDED_REMEMBERED, LOAN_S, LOANS_MAX, LeaseTable
from services.transfer.protocol import FirstToken


class Subject:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.ends: list[tuple[str, str]] = []
        self.table = LeaseTable(self.clock, ttl_s=5.0, on_end=lambda name, how: self.ends.append((name, how)))


@pytest.fixture
def subject() -> Subject:
    return Subject()


def test_a_release_within_the_time_to_live_is_valid_once(subject: Subject) -> None:
    subject.table.open("a", 10).finished(FirstToken(0, 1, None), 0.0)
    subject.clock.advance(4.9)
    assert subject.table.release("a")
    assert not subject.table.release("a")
    assert subject.ends == [("a", "released")]


def test_a_release_after_the_time_to_live_is_not_valid_even_before_the_sweep(subject: Subject) -> None:
    subject.table.open("a", 10)
    subject.clock.advance(5.0)
    assert not subject.table.release("a")
    assert subject.ends == [("a", "expired")]


def test_a_held_lease_does_not_expire_and_lives_on_after_the_call(subject: Subject) -> None:
    lease = subject.table.open("a", 10)
    with subject.table.hold(lease):
        subject.clock.advance(100)
        subject.table.expire_due()
    subject.clock.advance(4.9)
    subject.table.expire_due()
    assert subject.ends == []
    subject.clock.advance(0.1)
    subject.table.expire_due()
    assert subject.ends == [("a", "expired")]


async def test_the_sweep_frees_leases_that_nobody_releases(subject: Subject) -> None:
    subject.table.open("a", 10)
    sweep = asyncio.create_task(subject.table.expire_forever())
    for _ in range(8):
        await asyncio.sleep(0)
        subject.clock.advance(1.0)
        await asyncio.sleep(0)
    sweep.cancel()
    assert subject.ends == [("a", "expired")]
    assert subject.table.open_leases == 0


async def test_a_pull_that_comes_early_waits_for_its_prefill(subject: Subject) -> None:
    finding = asyncio.create_task(subject.table.find("a", wait_s=5))
    await asyncio.sleep(0)
    lease = subject.table.open("a", 10)
    assert await finding is lease


async def test_a_pull_without_a_prefill_ends_and_leaves_nothing_parked(subject: Subject) -> None:
    with pytest.raises(KvSourceLost, match="no prefill"):
        await subject.table.find("a", wait_s=0.01)
    subject.table.open("a", 10)  # would fail on a waiter that was left behind


async def test_a_pull_of_an_ended_lease_is_refused_at_once_with_the_reason(subject: Subject) -> None:
    subject.table.open("a", 10).finished(FirstToken(0, 1, None), 0.0)
    subject.table.release("a")
    subject.table.fail(subject.table.open("b", 10), RequestCancelled("the client is gone"))
    with pytest.raises(KvSourceLost, match="released"):
        await subject.table.find("a", wait_s=60)
    with pytest.raises(RequestCancelled):
        await subject.table.find("b", wait_s=60)


async def test_only_the_latest_ended_leases_are_remembered(subject: Subject) -> None:
    for number in range(ENDED_REMEMBERED + 1):
        subject.table.fail(subject.table.open(str(number), 10), RequestCancelled("the client is gone"))
    with pytest.raises(KvSourceLost, match="no prefill"):
        await subject.table.find("0", wait_s=0.01)
    with pytest.raises(RequestCancelled):
        await subject.table.find("1", wait_s=60)


async def test_a_failed_prefill_wakes_its_reader_with_the_reason(subject: Subject) -> None:
    lease = subject.table.open("a", 10)
    reader = asyncio.create_task(lease.until(lambda: bool(lease.firsts)))
    await asyncio.sleep(0)
    subject.table.fail(lease, RequestCancelled("gone"))
    with pytest.raises(RequestCancelled):
        await reader
    assert subject.ends == [("a", "failed")]
    assert not subject.table.release("a")


async def test_a_puller_that_gives_up_ends_the_prefill(subject: Subject) -> None:
    lease = subject.table.open("a", 10)
    with subject.table.hold(lease):
        running = asyncio.create_task(lease.until(lambda: bool(lease.firsts)))
        await asyncio.sleep(0)
        assert not subject.table.release("a")
        with pytest.raises(Overloaded, match="gave the transfer up"):
            await running
    assert subject.ends == [("a", "failed")]


async def test_an_expired_lease_wakes_its_reader(subject: Subject) -> None:
    lease = subject.table.open("a", 10)
    reader = asyncio.create_task(lease.until(lambda: bool(lease.firsts)))
    await asyncio.sleep(0)
    subject.clock.advance(6)
    subject.table.expire_due()
    with pytest.raises(WorkerLost, match="expired"):
        await reader


async def test_waiters_see_every_change_that_makes_their_condition_true(subject: Subject) -> None:
    lease = subject.table.open("a", 10)
    waiters = [asyncio.create_task(lease.until(lambda n=n: lease.computed >= n)) for n in (1, 5, 9)]
    for computed in (1, 6, 9):
        await asyncio.sleep(0)
        lease.advanced(computed, [])
    lease.finished(FirstToken(0, 1, None), 0.0)
    await asyncio.gather(*waiters)


def test_a_loan_is_complete_when_it_is_lent_and_its_release_is_valid(subject: Subject) -> None:
    lease = subject.table.open_loan("a")
    assert not lease.complete
    lease.lent([3, 4], 8, 0.0)
    assert (lease.complete, lease.tokens, lease.firsts) == (True, 8, [])
    assert subject.table.release("a")
    assert subject.ends == [("a", "released")]


def test_a_loan_ends_in_time_even_under_a_reader(subject: Subject) -> None:
    lease = subject.table.open_loan("a")
    with subject.table.hold(lease):
        subject.clock.advance(LOAN_S - 0.1)
        subject.table.expire_due()
        assert subject.ends == []
        subject.clock.advance(0.1)
        subject.table.expire_due()
        assert subject.ends == [("a", "expired")]
        assert isinstance(lease.error, WorkerLost)
    assert not subject.table.release("a")


def test_loans_are_bounded_and_other_leases_are_not_counted(subject: Subject) -> None:
    for n in range(LOANS_MAX):
        subject.table.open(f"prefill{n}", 10)
        subject.table.open_loan(f"loan{n}")
    with pytest.raises(Overloaded):
        subject.table.open_loan("one more")
    subject.table.fail(subject.table.open("x", 1), KvSourceLost("gone"))
    assert subject.table.open_leases == 2 * LOANS_MAX
