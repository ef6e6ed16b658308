"""How long steps and transfers of the real model take: a table of measurements, and a way between its points.

The table lies beside this file as step_times.json; `python -m tests.bench.routing.measure` measures it anew.
A grid has two axes, tokens (or sequences) of a step and tokens of context before each, and is read by
bilinear interpolation; beyond its ends it goes on as straight as between its last two points. This is not
the model that workers fit to their steps (services/engine/step_times.py), which knows nothing of the table.
"""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec

from services.engine.runner import Row

MEASURED = Path(__file__).with_name("step_times.json")


class Grid(msgspec.Struct, frozen=True):
    """`ms[i][j]` milliseconds at `size[i]` and `context[j]`; both rise, and have two points or more."""

    size: list[int]
    context: list[int]
    ms: list[list[float]]

    def at(self, size: float, context: float) -> float:
        i, share = _place(self.size, size)
        j, along = _place(self.context, context)
        low, high = self.ms[i], self.ms[i + 1]
        lower = low[j] + (low[j + 1] - low[j]) * along
        upper = high[j] + (high[j + 1] - high[j]) * along
        return lower + (upper - lower) * share


class StepTable(msgspec.Struct, frozen=True, kw_only=True):
    machine: str
    model: str
    threads: int  # of one worker
    prefill: Grid  # one prompt's chunk: tokens, and tokens before them
    decode: Grid  # sequences, and the context of each
    mixed_saving_ms: float  # what a step with both takes less than two steps
    transfer_ms: float  # of KV from one worker to another: fixed, and for each token
    transfer_ms_per_token: float

    def step_ms(self, prefill_tokens: int, prefill_start: float, sequences: int, context: float) -> float:
        """`prefill_start`: tokens before the chunk, weighted by tokens if there are several chunks;
        `context`: mean of the decoding sequences."""
        prefill_ms = self.prefill.at(prefill_tokens, prefill_start) if prefill_tokens else 0.0
        decode_ms = self.decode.at(sequences, context) if sequences else 0.0
        if prefill_tokens and sequences:
            return max(prefill_ms + decode_ms - self.mixed_saving_ms, prefill_ms, decode_ms)
        return prefill_ms + decode_ms


class Noise(msgspec.Struct, frozen=True, kw_only=True):
    """A step takes exp(N(0, spread)) times what the table says; now and then one takes much longer."""

    spread: float = 0.1
    outliers: float = 0.002  # share of the steps
    outlier_factor: float = 6.0

    def factor(self, rng: Random) -> float:
        usual = rng.lognormvariate(0.0, self.spread)
        return usual * self.outlier_factor if rng.random() < self.outliers else usual


def read_table(path: Path = MEASURED) -> StepTable:
    return msgspec.json.decode(path.read_bytes(), type=StepTable)


def rows_ms(table: StepTable, rows: Sequence[Row]) -> float:
    """What the table says about a step of these rows."""
    prefill_tokens = sequences = context = 0
    weighted_start = 0
    for row in rows:
        tokens = len(row.tokens)
        if tokens == 1 and row.samples and row.samples[0].output_ids:
            sequences += 1
            context += row.start
        else:
            prefill_tokens += tokens
            weighted_start += tokens * row.start
    return table.step_ms(
        prefill_tokens, weighted_start / max(prefill_tokens, 1), sequences, context / max(sequences, 1)
    )


def _place(axis: list[int], value: float) -> tuple[int, float]:
    """The interval of the axis to read `value` from, and where in it: outside [0, 1] beyond the ends."""
    i = min(max(bisect_right(axis, value) - 1, 0), len(axis) - 2)
    return i, (value - axis[i]) / (axis[i + 1] - axis[i])
