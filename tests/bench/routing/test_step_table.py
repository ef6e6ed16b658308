"""Steps take what was measured, at the points and between them."""

import random
from statistics import fmean

import pytest

from services.core.sampling import SamplingParams
from services.engine.runner import Row, Sample
from tests.bench.routing.step_table import Grid, Noise, StepTable, read_table, rows_ms

GRID = Grid([1, 16, 64], [0, 1000], [[10.0, 20.0], [30.0, 60.0], [80.0, 180.0]])
TABLE = StepTable(
    machine="",
    model="",
    threads=1,
    prefill=GRID,
    decode=Grid([1, 2], [0, 100], [[5.0, 6.0], [7.0, 9.0]]),
    mixed_saving_ms=2.0,
    transfer_ms=1.0,
    transfer_ms_per_token=0.1,
)


@pytest.mark.parametrize(
    ("size", "context", "ms"),
    [(16, 0, 30.0), (16, 1000, 60.0), (16, 500, 45.0), (40, 0, 55.0), (112, 0, 130.0), (64, 2000, 280.0)],
)
def test_a_grid_is_straight_between_its_points_and_beyond_its_ends(
    size: int, context: int, ms: float
) -> None:
    assert GRID.at(size, context) == pytest.approx(ms)


def test_a_mixed_step_takes_less_than_its_parts_and_more_than_each() -> None:
    assert TABLE.step_ms(16, 0, 2, 100) == pytest.approx(30.0 + 9.0 - 2.0)
    assert TABLE.step_ms(16, 0, 0, 0) == pytest.approx(30.0)
    assert TABLE.step_ms(0, 0, 1, 0) == pytest.approx(5.0)


def test_rows_are_told_apart_as_prompts_and_decoding_sequences() -> None:
    params = SamplingParams(max_tokens=9)
    decoding = [Row([1], start, [0], [Sample(params, [1], [2])]) for start in (0, 100)]
    chunk = Row([1] * 16, 500, [0], [])
    last_token_of_a_prompt = Row([1], 0, [0], [Sample(params, [1], [])])
    assert rows_ms(TABLE, decoding) == pytest.approx(TABLE.step_ms(0, 0, 2, 50))
    assert rows_ms(TABLE, [chunk, *decoding]) == pytest.approx(TABLE.step_ms(16, 500, 2, 50))
    assert rows_ms(TABLE, [last_token_of_a_prompt]) == pytest.approx(10.0)


def test_noise_is_around_one_with_rare_long_steps() -> None:
    rng = random.Random(0)
    factors = [Noise(spread=0.1, outliers=0.01, outlier_factor=10.0).factor(rng) for _ in range(20_000)]
    assert fmean(sorted(factors)[:-400]) == pytest.approx(1.0, abs=0.02)
    assert 100 < sum(factor > 5 for factor in factors) < 300


def test_what_was_measured_grows_with_the_work() -> None:
    table = read_table()
    for grid in (table.prefill, table.decode):
        assert len(grid.ms) == len(grid.size)
        assert all(len(line) == len(grid.context) for line in grid.ms)
        assert all(line[0] < line[-1] for line in grid.ms)
        assert all(before[-1] < after[-1] for before, after in zip(grid.ms, grid.ms[1:], strict=False))
    assert table.transfer_ms_per_token < table.prefill.at(128, 0) / 128  # else nobody would fetch
