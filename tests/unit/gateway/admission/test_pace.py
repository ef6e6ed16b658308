"""The pace of a queue is that of the times in which somebody waits."""

import pytest

from services.core.clock import ManualClock
from services.gateway.admission.fair_queue import Priority
from services.gateway.admission.pace import Pace

NORMAL, LOW = Priority.NORMAL, Priority.LOW


def waited(pace: Pace, clock: ManualClock, seconds: float, *priorities: Priority) -> None:
    pace.note_waiting(priorities)
    clock.advance(seconds)
    pace.count()


def test_what_goes_through_an_empty_queue_says_nothing() -> None:
    """However little time passes between coming and going: real clocks never stand still."""
    clock = ManualClock()
    pace = Pace(clock)
    for _ in range(1000):
        clock.advance(0.1)
        pace.count()
        clock.advance(1e-6)
        pace.note_place(NORMAL, 1000, others_wait=False)
        pace.note_waiting([])
    assert pace.tokens_per_s(predicted=300.0) == 300.0


def test_places_given_while_somebody_waits_make_the_pace() -> None:
    clock = ManualClock()
    pace = Pace(clock)
    for _ in range(300):
        waited(pace, clock, 0.5, NORMAL)
        pace.note_place(NORMAL, 100, others_wait=True)
        pace.note_waiting([])
        clock.advance(10.0)  # in which nobody waits
        pace.count()
    assert pace.tokens_per_s(predicted=500.0) == pytest.approx(200, rel=0.02)


def test_a_class_that_is_overtaken_has_a_slower_pace_than_the_queue() -> None:
    clock = ManualClock()
    pace = Pace(clock)
    for turn in range(400):
        waited(pace, clock, 0.1, NORMAL, LOW)
        pace.note_place(LOW if turn % 5 == 0 else NORMAL, 100, others_wait=True)
    assert pace.tokens_per_s(predicted=500.0) == pytest.approx(1000, rel=0.05)
    assert pace.tokens_per_s_of(LOW, predicted=500.0) == pytest.approx(200, rel=0.1)
    assert pace.tokens_per_s_of(NORMAL, predicted=500.0) == pytest.approx(800, rel=0.1)
    assert pace.tokens_per_s_of(Priority.HIGH, predicted=500.0) == pytest.approx(1000, rel=0.05), (
        "never waited"
    )
