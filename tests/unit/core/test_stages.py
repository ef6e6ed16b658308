"""Stages of a request: the table of transitions and the times a Timeline records."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.clock import ManualClock
from services.core.stages import ENDS, TRANSITIONS, Stage, Timeline


def timeline(clock: ManualClock) -> tuple[Timeline, list[tuple[Stage, float]]]:
    left: list[tuple[Stage, float]] = []
    return Timeline(clock, lambda stage, seconds: left.append((stage, seconds))), left


def test_every_stage_has_a_row_and_only_ends_have_no_successor() -> None:
    assert set(TRANSITIONS) == set(Stage)
    assert {stage for stage, next_stages in TRANSITIONS.items() if not next_stages} == ENDS


def test_every_stage_but_the_first_can_be_reached_and_every_open_one_can_fail() -> None:
    reachable = set().union(*TRANSITIONS.values())
    assert reachable == set(Stage) - {Stage.RECEIVED}
    for stage in set(Stage) - ENDS:
        assert {Stage.FAILED, Stage.CANCELLED} <= TRANSITIONS[stage]


@pytest.mark.parametrize("stage", [Stage.RECEIVED, Stage.DECODING, Stage.FINISHED])
def test_an_illegal_transition_is_refused(stage: Stage) -> None:
    line, left = timeline(ManualClock())
    with pytest.raises(AssertionError, match="illegal transition"):
        line.enter(stage)
    assert line.stage is Stage.RECEIVED
    assert left == []


def test_time_is_charged_to_the_stage_that_is_left() -> None:
    clock = ManualClock(100.0)
    line, left = timeline(clock)
    clock.advance(2.0)
    line.enter(Stage.ADMITTED)
    clock.advance(3.0)
    line.enter(Stage.ROUTED)
    assert left == [(Stage.RECEIVED, 2.0), (Stage.ADMITTED, 3.0)]
    assert line.seconds_in(Stage.ADMITTED) == 3.0
    assert line.seconds_in(Stage.ROUTED) == 0.0


def test_visits_of_several_attempts_add_up() -> None:
    clock = ManualClock()
    line, _ = timeline(clock)
    line.enter(Stage.ADMITTED)
    for _ in range(2):
        line.enter(Stage.ROUTED)
        line.enter(Stage.PREFILLING)
        clock.advance(1.5)
        line.enter(Stage.ADMITTED)
    assert line.seconds_in(Stage.PREFILLING) == 3.0


def test_a_timeline_can_start_before_it_is_made() -> None:
    left: list[float] = []
    line = Timeline(ManualClock(10.0), lambda _, seconds: left.append(seconds), started_at=8.5)
    line.enter(Stage.ADMITTED)
    assert left == [1.5]


@given(st.data())
def test_the_visits_of_any_legal_walk_sum_to_its_length(data: st.DataObject) -> None:
    clock = ManualClock()
    line, left = timeline(clock)
    for _ in range(20):
        if line.stage in ENDS:
            break
        clock.advance(data.draw(st.integers(0, 5)))
        line.enter(data.draw(st.sampled_from(sorted(TRANSITIONS[line.stage]))))
    assert sum(seconds for _, seconds in left) == line.entered_at - line.started_at
    assert sum(line.seconds_in(stage) for stage in Stage) == line.entered_at
