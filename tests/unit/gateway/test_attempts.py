"""When a request may try again, what it avoids, and when its patience ends. On a manual clock."""

import asyncio
import random

import pytest

from router.state import Route
from services.core.clock import ManualClock
from services.core.errors import (
    FACTS,
    DeadlineExceeded,
    DiptychError,
    Draining,
    NoWorker,
    Overloaded,
    RoleChanged,
    WorkerLost,
)
from services.gateway.attempts import (
    EXCLUSION_S,
    PAUSE_MAX_S,
    PAUSE_MIN_S,
    SENT_AWAY_S,
    Patience,
    RetryPolicy,
)
from services.gateway.generation import AttemptFailed, Event, Routed
from services.gateway.waiting_line import HOLD_BACK_AFTER_S, WaitingLine
from services.gateway.worker_client import OutputToken, Reserved, Started
from tests.unit.gateway.scripted_worker_server import report

D1 = report("d1", "decode")
POLICY = RetryPolicy(attempts_max=3, attempts_total_max=6, admission_timeout_s=10.0, no_worker_timeout_s=4.0)


class JumpingClock(ManualClock):
    """Sleeping takes no time but its own."""

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)


def patience(clock: ManualClock, deadline: float = 1000.0) -> Patience:
    return Patience(POLICY, WaitingLine(clock), deadline, clock, random.Random(3))


@pytest.mark.parametrize("kind", [kind for kind, facts in FACTS.items() if not facts.retryable])
def test_errors_that_another_attempt_cannot_help_end_the_request(kind: type[DiptychError]) -> None:
    with pytest.raises(kind):
        patience(ManualClock()).admit_failure(AttemptFailed(kind("no"), D1))


UNCOUNTED = (Overloaded, NoWorker, Draining, RoleChanged)


@pytest.mark.parametrize("kind", [k for k, f in FACTS.items() if f.retryable and k not in UNCOUNTED])
def test_failures_are_bounded_and_the_last_error_is_raised(kind: type[DiptychError]) -> None:
    budget = patience(ManualClock())
    budget.admit_failure(AttemptFailed(kind("first"), D1))
    budget.admit_failure(AttemptFailed(kind("second"), D1))
    with pytest.raises(kind, match="third"):
        budget.admit_failure(AttemptFailed(kind("third"), D1))


def test_a_token_lets_the_count_of_failures_start_anew_but_not_for_ever() -> None:
    budget, lost = patience(ManualClock()), AttemptFailed(WorkerLost("gone"), D1)
    for index in range(POLICY.attempts_total_max - 1):
        budget.admit_failure(lost)
        budget.note(OutputToken(index, 1))
    with pytest.raises(WorkerLost):
        budget.admit_failure(lost)


@pytest.mark.parametrize("kind", [Draining, RoleChanged])
def test_being_sent_away_is_no_failure_yet_no_request_is_sent_round_for_ever(kind) -> None:
    budget, away = patience(ManualClock()), AttemptFailed(kind("elsewhere"), D1)
    for _ in range(POLICY.attempts_total_max - 1):
        budget.admit_failure(away)
    with pytest.raises(kind):
        budget.admit_failure(away)


async def test_a_worker_that_sends_away_is_avoided_until_its_report_says_why() -> None:
    clock = JumpingClock()
    budget, away = patience(clock), AttemptFailed(Draining("elsewhere"), D1)
    budget.admit_failure(away)
    await budget.pause(away)
    assert clock.now() == 0.0, "there is nothing to wait for"
    assert budget.excluded == {D1.key}
    clock.advance(SENT_AWAY_S)
    assert budget.excluded == set()


@pytest.mark.parametrize(
    ("error", "limit_s"),
    [
        (Overloaded("full", retry_after_s=3), POLICY.admission_timeout_s),
        (NoWorker("none"), POLICY.no_worker_timeout_s),
    ],
)
async def test_waiting_for_capacity_lasts_as_long_as_the_policy_says(error, limit_s: float) -> None:
    clock = JumpingClock()
    budget, failed = patience(clock), AttemptFailed(error, D1)
    waits = 0

    async def wait_for_ever() -> None:
        nonlocal waits
        while True:
            budget.admit_failure(failed)
            await budget.pause(failed)
            waits += 1

    with pytest.raises(type(error)):
        await wait_for_ever()
    assert limit_s <= clock.now() <= limit_s + PAUSE_MAX_S
    assert limit_s / PAUSE_MAX_S <= waits <= limit_s / PAUSE_MIN_S
    assert budget.excluded == set()


async def test_progress_lets_the_waiting_start_anew() -> None:
    clock = JumpingClock()
    budget, full = patience(clock), AttemptFailed(Overloaded("full"))
    budget.admit_failure(full)
    clock.advance(POLICY.admission_timeout_s - 1)
    budget.note(OutputToken(0, 1))
    budget.admit_failure(full)
    clock.advance(POLICY.admission_timeout_s - 1)
    budget.admit_failure(full)


async def test_the_deadline_ends_the_waiting() -> None:
    clock = JumpingClock()
    budget, full = patience(clock, deadline=0.01), AttemptFailed(Overloaded("full"))
    budget.admit_failure(full)
    with pytest.raises(DeadlineExceeded):
        await budget.pause(full)


async def test_after_other_failures_the_next_attempt_comes_at_once() -> None:
    clock = JumpingClock()
    budget, lost = patience(clock), AttemptFailed(WorkerLost("gone"), D1)
    budget.admit_failure(lost)
    await budget.pause(lost)
    assert clock.now() == 0.0


def test_a_failed_worker_is_avoided_for_a_while() -> None:
    clock = ManualClock()
    budget = patience(clock)
    budget.admit_failure(AttemptFailed(WorkerLost("gone"), D1))
    assert budget.excluded == {D1.key}
    clock.advance(EXCLUSION_S)
    assert budget.excluded == set()


def test_a_choice_that_goes_on_by_itself_inherits_failures_and_shares_none_of_its_own() -> None:
    whole = patience(ManualClock())
    whole.admit_failure(AttemptFailed(WorkerLost("gone"), D1))
    one, other = whole.fork(), whole.fork()
    d2 = report("d2", "decode")
    one.admit_failure(AttemptFailed(WorkerLost("gone"), d2))
    assert one.excluded == {D1.key, d2.key}
    assert other.excluded == {D1.key}
    other.admit_failure(AttemptFailed(WorkerLost("gone"), D1))
    with pytest.raises(WorkerLost):
        one.admit_failure(AttemptFailed(WorkerLost("gone"), D1))


class TestTheWaitingLine:
    def setup_method(self) -> None:
        self.clock = JumpingClock()
        self.line = WaitingLine(self.clock)
        self.old, self.young = self.waiter(), self.waiter()

    def waiter(self) -> Patience:
        return Patience(POLICY, self.line, 1000.0, self.clock, random.Random(3))

    def refuse(self, waiter: Patience) -> None:
        waiter.admit_failure(AttemptFailed(Overloaded("full"), D1))

    async def test_nobody_waits_for_a_request_that_was_just_refused(self) -> None:
        self.refuse(self.old)
        await self.young.turn()
        assert self.clock.now() == 0

    async def test_younger_and_new_requests_hold_back_once_the_oldest_has_waited_long(self) -> None:
        self.refuse(self.old)
        self.refuse(self.young)
        self.clock.advance(HOLD_BACK_AFTER_S)
        assert self.line.holds_back(self.young)
        assert self.line.holds_back(self.waiter())
        assert len(self.line) == 2
        await self.old.turn()
        assert self.clock.now() == HOLD_BACK_AFTER_S

    @pytest.mark.parametrize("word", [Reserved(), Started(0, 0.0, 0, 0.0, 0.0), OutputToken(0, 1), None])
    async def test_the_next_may_go_when_the_oldest_has_room_or_is_over(self, word: Event | None) -> None:
        self.refuse(self.old)
        self.clock.advance(HOLD_BACK_AFTER_S)
        self.old.note(word) if word else self.old.end()
        await self.young.turn()
        assert self.clock.now() == HOLD_BACK_AFTER_S

    async def test_the_line_moves_on_with_the_first_word_not_with_the_first_token(self) -> None:
        waiters = [self.waiter() for _ in range(20)]
        for waiter in waiters:
            self.refuse(waiter)
            self.clock.advance(0.001)
        self.clock.advance(HOLD_BACK_AFTER_S)
        stopped = ManualClock(self.clock.now())  # a poll would never come back
        self.line._clock = stopped
        served: list[Patience] = []

        async def look_for_room(waiter: Patience) -> None:
            await waiter.turn()
            served.append(waiter)
            await asyncio.sleep(0)
            waiter.note(Reserved())

        async with asyncio.timeout(5):
            await asyncio.gather(*map(look_for_room, waiters))
        assert served == waiters

    async def test_a_request_whose_room_is_taken_back_finds_its_old_place(self) -> None:
        self.refuse(self.old)
        self.clock.advance(1.0)
        self.refuse(self.young)
        self.old.note(Reserved())
        self.refuse(self.old)
        self.clock.advance(HOLD_BACK_AFTER_S)
        assert self.line.holds_back(self.young)
        assert not self.line.holds_back(self.old)

    @pytest.mark.parametrize("error", [NoWorker("none"), Overloaded("full")])
    async def test_a_request_that_avoids_a_worker_holds_nobody_back_from_it(self, error) -> None:
        self.refuse(self.old)
        self.old.admit_failure(AttemptFailed(WorkerLost("gone"), D1))
        self.old.admit_failure(AttemptFailed(error))
        self.clock.advance(HOLD_BACK_AFTER_S)
        assert not self.line.holds_back(self.young)
        self.clock.advance(EXCLUSION_S - HOLD_BACK_AFTER_S)
        self.old.admit_failure(AttemptFailed(error))
        assert self.line.holds_back(self.young), "its old place is not lost"

    async def test_waiting_for_room_is_not_waiting_for_a_worker(self) -> None:
        self.refuse(self.old)
        self.clock.advance(POLICY.no_worker_timeout_s + 1)
        self.old.admit_failure(AttemptFailed(NoWorker("none for a moment"), None))

    async def test_a_route_ends_the_time_without_a_worker(self) -> None:
        self.old.admit_failure(AttemptFailed(NoWorker("none"), None))
        self.clock.advance(POLICY.no_worker_timeout_s - 1)
        self.old.note(Routed(Route((), ()), None, D1))
        self.old.admit_failure(AttemptFailed(WorkerLost("gone"), D1))
        self.clock.advance(2)
        self.old.admit_failure(AttemptFailed(NoWorker("none again"), None))

    async def test_holding_back_is_waiting_for_capacity_and_ends_like_it(self) -> None:
        self.refuse(self.old)
        self.clock.advance(HOLD_BACK_AFTER_S)
        with pytest.raises(Overloaded, match="Older requests"):
            await self.young.turn()
        waited_s = self.clock.now() - HOLD_BACK_AFTER_S
        assert POLICY.admission_timeout_s <= waited_s <= POLICY.admission_timeout_s + PAUSE_MAX_S
