"""Estimates begin with what is assumed or predicted, follow what is seen, and forget."""

import pytest

from services.gateway.admission.forecast import (
    ANSWER_TOKENS_ASSUMED,
    CORRECTION_MAX,
    CORRECTION_MIN,
    AnswerLengths,
    Correction,
    Throughput,
)


def test_answers_are_as_long_as_the_last_ones_but_never_above_what_was_asked_for() -> None:
    lengths = AnswerLengths()
    assert lengths.expected(10_000) == ANSWER_TOKENS_ASSUMED
    for _ in range(20):
        lengths.note(20, 10_000)
    assert lengths.expected(10_000) == pytest.approx(20, abs=6)
    for _ in range(300):
        lengths.note(400, 10_000)
    assert lengths.expected(10_000) == pytest.approx(400, rel=0.02)
    assert lengths.expected(7) == 7
    lengths.note(0, 10_000)
    assert AnswerLengths().expected(1) == 1


def test_answers_that_their_limit_cut_short_do_not_make_others_seem_short() -> None:
    lengths = AnswerLengths()
    for _ in range(100):
        lengths.note(1, 1)
    assert lengths.expected(10_000) == ANSWER_TOKENS_ASSUMED
    for _ in range(300):
        lengths.note(400, 400)
    assert lengths.expected(10_000) == pytest.approx(400, rel=0.02), "they have at least as much"


def test_throughput_is_predicted_at_first_and_then_what_is_seen() -> None:
    throughput = Throughput()
    assert throughput.per_second(predicted=500.0) == 500.0
    for _ in range(600):
        throughput.note_wait(0.1)
        throughput.note_leave(20)
    for predicted in (2.0, 5000.0):
        assert throughput.per_second(predicted) == pytest.approx(200, rel=0.15)


def test_throughput_forgets_a_slow_time() -> None:
    throughput = Throughput()
    throughput.note_wait(100.0)
    for _ in range(1000):
        throughput.note_wait(0.1)
        throughput.note_leave(100)
    assert throughput.per_second(predicted=1.0) == pytest.approx(1000, rel=0.05)


def test_a_standing_queue_has_a_throughput_above_zero() -> None:
    throughput = Throughput()
    throughput.note_wait(1000.0)
    assert throughput.per_second(predicted=100.0) > 0


def test_first_tokens_that_come_late_make_the_next_ones_be_expected_late() -> None:
    correction = Correction()
    assert correction.factor == 1.0
    for _ in range(100):
        correction.note(expected_ms=100.0, seen_ms=200.0)
    assert correction.factor == pytest.approx(2.0)
    for _ in range(100):
        correction.note(expected_ms=100.0, seen_ms=50.0)
    assert correction.factor == pytest.approx(0.5, rel=0.05)


def test_a_correction_is_bounded() -> None:
    slow, fast = Correction(), Correction()
    slow.note(1.0, 60_000.0)
    fast.note(60_000.0, 1.0)
    assert (slow.factor, fast.factor) == (CORRECTION_MAX, CORRECTION_MIN)
