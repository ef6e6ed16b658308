"""Which new work a worker takes, and when it becomes another incarnation."""

import pytest

from services.core.clock import ManualClock
from services.core.errors import DiptychError, Draining, RoleChanged, WorkerLost
from services.core.worker_report import WorkerKey
from services.engine.incarnation import BEAT_S, Incarnation

LEASE_S = 2.0


class Subject:
    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.incarnation = Incarnation(WorkerKey("w", 1), "both", self.clock, LEASE_S, new_epoch=lambda: 2)

    def run_for(self, seconds: float) -> list[bool]:
        """What the beats of so many seconds say."""
        beats = []
        for _ in range(round(seconds / BEAT_S)):
            self.clock.advance(BEAT_S)
            beats.append(self.incarnation.beat())
        return beats


@pytest.fixture
def subject() -> Subject:
    return Subject()


def test_a_process_that_runs_stays_the_same_incarnation(subject: Subject) -> None:
    assert not any(subject.run_for(60.0))
    assert subject.incarnation.key.epoch == 1
    subject.incarnation.check(1, "decode")


def test_standing_still_for_less_than_the_lease_changes_nothing(subject: Subject) -> None:
    subject.clock.advance(LEASE_S)
    assert not subject.incarnation.beat()
    subject.incarnation.check(1, "prefill")


def test_standing_still_for_longer_takes_one_new_epoch(subject: Subject) -> None:
    subject.clock.advance(LEASE_S + 0.1)
    assert subject.incarnation.beat()
    assert subject.incarnation.key == WorkerKey("w", 2)
    assert not any(subject.run_for(10.0))
    subject.incarnation.check(2, "decode")
    with pytest.raises(WorkerLost):
        subject.incarnation.check(1, "decode")


def test_calls_that_are_handled_before_the_first_beat_are_refused_too(subject: Subject) -> None:
    subject.clock.advance(LEASE_S + 0.1)
    assert not subject.incarnation.is_current(1)
    with pytest.raises(WorkerLost):
        subject.incarnation.check(1, "decode")


@pytest.mark.parametrize(
    ("role", "part", "refused"),
    [
        ("prefill", "prefill", False),
        ("prefill", "decode", True),
        ("decode", "prefill", True),
        ("decode", "decode", False),
        ("both", "prefill", False),
        ("both", "decode", False),
    ],
)
def test_a_role_takes_its_part_of_a_request_only(subject: Subject, role, part, refused: bool) -> None:  # type: ignore[no-untyped-def]
    subject.incarnation.role = role
    refusal: DiptychError | None = None
    try:
        subject.incarnation.check(1, part)
    except RoleChanged as error:
        refusal = error
    assert (refusal is not None) is refused
    assert subject.incarnation.is_current(1), "what runs is not asked for its role"


def test_a_draining_worker_takes_nothing_new_and_is_still_the_same_incarnation(subject: Subject) -> None:
    subject.incarnation.draining = True
    with pytest.raises(Draining):
        subject.incarnation.check(1, "decode")
    assert subject.incarnation.is_current(1)


def test_a_start_that_takes_long_is_no_standing_still(subject: Subject) -> None:
    subject.clock.advance(60.0)
    subject.incarnation.begin()
    assert not any(subject.run_for(1.0))
    subject.incarnation.check(1, "prefill")
