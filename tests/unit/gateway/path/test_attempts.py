"""When a request may try again, what it avoids, and since when it waits. On a manual clock."""

import pytest

from services.core.clock import ManualClock
from services.core.errors import FACTS, DiptychError, Draining, Overloaded, RoleChanged, WorkerLost
from services.gateway.path.attempts import EXCLUSION_S, SENT_AWAY_S, Patience, RetryPolicy
from services.gateway.path.generation import AttemptFailed
from services.gateway.workers.worker_client import OutputToken, Reserved
from tests.unit.gateway.scripted_worker_server import report

D1 = report("d1", "decode")
POLICY = RetryPolicy(attempts_max=3, attempts_total_max=6)


def patience(clock: ManualClock) -> Patience:
    return Patience(POLICY, clock)


@pytest.mark.parametrize("kind", [kind for kind, facts in FACTS.items() if not facts.retryable])
def test_errors_that_another_attempt_cannot_help_end_the_request(kind: type[DiptychError]) -> None:
    with pytest.raises(kind):
        patience(ManualClock()).admit_failure(AttemptFailed(kind("no"), D1))


UNCOUNTED = (Overloaded, Draining, RoleChanged)


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


def test_a_worker_that_sends_away_is_avoided_until_its_report_says_why() -> None:
    clock = ManualClock()
    budget = patience(clock)
    budget.admit_failure(AttemptFailed(Draining("elsewhere"), D1))
    assert budget.excluded() == {D1.key}
    clock.advance(SENT_AWAY_S)
    assert budget.excluded() == set()


def test_waiting_for_room_is_no_failure_and_excludes_nobody() -> None:
    budget, full = patience(ManualClock()), AttemptFailed(Overloaded("full"), D1)
    for _ in range(2 * POLICY.attempts_total_max):
        budget.admit_failure(full)
    assert budget.excluded() == set()


def test_a_request_waits_since_it_came_or_since_its_last_token() -> None:
    clock = ManualClock(5.0)
    budget, full = patience(clock), AttemptFailed(Overloaded("full"), D1)
    clock.advance(1.0)
    budget.admit_failure(full)
    clock.advance(1.0)
    budget.admit_failure(full)
    assert (budget.waiting_since, budget.blockless_since) == (5.0, 6.0), "its old place is not lost"
    budget.note(Reserved())
    assert (budget.waiting_since, budget.blockless_since) == (5.0, 6.0), "room may be taken back"
    budget.note(OutputToken(0, 1))
    clock.advance(1.0)
    assert (budget.waiting_since, budget.blockless_since) == (8.0, None)


def test_a_failed_worker_is_avoided_for_a_while() -> None:
    clock = ManualClock()
    budget = patience(clock)
    budget.admit_failure(AttemptFailed(WorkerLost("gone"), D1))
    assert budget.excluded() == {D1.key}
    clock.advance(EXCLUSION_S)
    assert budget.excluded() == set()


def test_a_choice_that_goes_on_by_itself_inherits_failures_and_shares_none_of_its_own() -> None:
    whole = patience(ManualClock())
    whole.admit_failure(AttemptFailed(WorkerLost("gone"), D1))
    one, other = whole.fork(), whole.fork()
    d2 = report("d2", "decode")
    one.admit_failure(AttemptFailed(WorkerLost("gone"), d2))
    assert one.excluded() == {D1.key, d2.key}
    assert other.excluded() == {D1.key}
    other.admit_failure(AttemptFailed(WorkerLost("gone"), D1))
    with pytest.raises(WorkerLost):
        one.admit_failure(AttemptFailed(WorkerLost("gone"), D1))
