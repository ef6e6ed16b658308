"""How long a step will take follows from those before it; one that was stopped midway is no measure."""

import pytest

from services.engine.step_times import StepTimes


def measured(decode_ms: float = 20.0, prefill_ms: float = 200.0) -> StepTimes:
    """100 prompt tokens take `prefill_ms`."""
    times = StepTimes()
    for _ in range(20):
        times.add(decode_ms, 0, 1)
        times.add(prefill_ms, 100, 0)
    return times


@pytest.mark.parametrize(
    ("prefill_tokens", "decode_tokens", "expected_ms"), [(0, 3, 20.0), (50, 0, 100.0), (50, 1, 120.0)]
)
def test_a_step_takes_what_its_parts_took(prefill_tokens, decode_tokens, expected_ms) -> None:  # type: ignore[no-untyped-def]
    assert measured().expected_ms(prefill_tokens, decode_tokens) == pytest.approx(expected_ms)


def test_nothing_is_expected_of_a_step_like_none_before() -> None:
    times = StepTimes()
    times.add(20.0, 0, 1)
    assert times.expected_ms(0, 2) == 20.0
    assert times.expected_ms(10, 2) is None
    assert StepTimes().expected_ms(0, 1) is None


def test_one_step_that_was_stopped_makes_no_slow_worker() -> None:
    times = measured()
    times.add(10_000.0, 0, 1)
    times.add(20.0, 0, 1)
    assert times.decode_step_ms == pytest.approx(20.0)


def test_a_worker_that_did_get_slower_is_known_soon() -> None:
    times = measured()
    for _ in range(12):
        times.add(400.0, 0, 1)
    assert times.decode_step_ms > 0.8 * 400.0
