"""Intervals say what the samples say, and no more."""

import math
import random

import pytest

from tests.bench.routing.statistics import mean_interval, paired_ratio


def test_equal_pairs_have_the_ratio_one_without_doubt() -> None:
    ratio = paired_ratio([1.0, 5.0, 100.0], [1.0, 5.0, 100.0])
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)
    assert not ratio.above_one
    assert not ratio.below_one


def test_what_all_pairs_share_is_found_however_much_the_pairs_differ() -> None:
    ratio = paired_ratio([1.1 * 1, 1.11 * 50, 1.09 * 9], [1.0, 50.0, 9.0])
    assert ratio.value == pytest.approx(1.1, rel=1e-3)
    assert ratio.above_one
    assert paired_ratio([1.0, 50.0, 9.0], [1.1 * 1, 1.11 * 50, 1.09 * 9]).below_one


def test_one_pair_proves_nothing() -> None:
    ratio = paired_ratio([2.0], [1.0])
    assert ratio.value == 2.0
    assert (ratio.low, ratio.high) == (0.0, math.inf)


def test_the_interval_holds_the_true_value_as_often_as_it_says() -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        interval = mean_interval([rng.gauss(3.0, 2.0) for _ in range(5)])
        held += interval.low <= 3.0 <= interval.high
    assert 0.93 < held / 2000 < 0.97
