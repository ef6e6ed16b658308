"""What Diptych wants to be, as ratios to the better of vLLM and llama.cpp in the same run.

A peer is compared by the setting with which it made most tokens/s, and the best of its weights. Another of
its settings may have been better in one figure (shorter gaps, at the cost of tokens/s), or it is faster with
weights of another kind than ours: the ratio to the best of all that was tried is told beside. Where a peer
failed requests, or we did, nothing is won.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.bench.cpu.contestant import COMPARED
from tests.bench.cpu.figures import Figures
from tests.bench.cpu.load import HEADLINE, SHORT, Shape
from tests.bench.cpu.results import Row

Verdict = Literal["met", "missed", "no claim"]
Figure = Callable[[Figures], float | None]


@dataclass(frozen=True, slots=True)
class Aim:
    """`at_least`: ours / theirs must reach it; `at_most`: must not exceed it."""

    name: str
    figure: Figure
    bound: float
    direction: Literal["at_least", "at_most"]
    ours: Callable[[Row], bool]
    theirs: Callable[[Row], bool]

    def judge(self, rows: Sequence[Row]) -> "Judged | None":
        """None if the run did not measure both sides."""
        ours = self._best(rows, lambda row: not row.trial and self.ours(row))
        theirs = self._best(
            rows, lambda row: not row.trial and row.precision in COMPARED and self.theirs(row)
        )
        best = self._best(rows, self.theirs)
        if ours is None or theirs is None or best is None:
            return None
        ratio = self._ratio(ours, theirs)
        reached = ratio >= self.bound if self.direction == "at_least" else ratio <= self.bound
        return Judged(
            self, ours, theirs, ratio, _verdict(reached, ours, theirs), self._ratio(ours, best), best
        )

    def _ratio(self, ours: Row, theirs: Row) -> float:
        return _known(self.figure(ours.figures)) / _known(self.figure(theirs.figures))

    def _best(self, rows: Sequence[Row], among: Callable[[Row], bool]) -> Row | None:
        known = [row for row in rows if among(row) and self.figure(row.figures)]
        best = max if self.direction == "at_least" else min
        return best(known, key=lambda row: _known(self.figure(row.figures)), default=None)


@dataclass(frozen=True, slots=True)
class Judged:
    aim: Aim
    ours: Row
    theirs: Row
    ratio: float
    verdict: Verdict
    ratio_to_tried: float  # to the best of all that was tried, which is this:
    tried: Row

    @property
    def why_no_claim(self) -> str:
        failing = [row for row in (self.ours, self.theirs) if row.figures.failed]
        return "; ".join(f"{row.contestant} failed {row.figures.failed} requests" for row in failing)


def aims() -> list[Aim]:
    peers = ("vLLM", "llama.cpp")
    throughput = [
        Aim(
            f"output tokens/s at concurrency {concurrency}",
            lambda figures: figures.tokens_per_s,
            bound,
            "at_least",
            _default(SHORT, concurrency),
            _of(peers, SHORT, concurrency),
        )
        for concurrency, bound in ((32, 4.0), (8, 3.0), (1, 1.3))
    ]
    int8 = [
        Aim(
            f"int8 against our own float32, tokens/s at concurrency {concurrency}",
            lambda figures: figures.tokens_per_s,
            2.0,
            "at_least",
            _default(SHORT, concurrency),
            _exact(SHORT, concurrency),
        )
        for concurrency in (1, 8, 32)
    ]
    return [
        *throughput,
        Aim(
            "time per output token at concurrency 1, against llama.cpp",
            lambda figures: figures.tpot_ms,
            1.0,
            "at_most",
            _default(SHORT, 1),
            _of(("llama.cpp",), SHORT, 1),
        ),
        Aim(
            "time to first token of a 256-token prompt at concurrency 1",
            lambda figures: figures.ttft_ms,
            1 / 3,
            "at_most",
            _default(SHORT, 1),
            _of(peers, SHORT, 1),
        ),
        Aim(
            "p99 inter-token latency at concurrency 32, 1 prefill + 1 decode",
            lambda figures: figures.itl_p99_ms,
            1 / 20,
            "at_most",
            lambda row: _default(SHORT, 32)(row) and "1+1" in row.contestant,
            _of(peers, SHORT, 32),
        ),
        Aim(
            "tokens/s at concurrency 32 against transformers one at a time, 16 in and 128 out",
            lambda figures: figures.tokens_per_s,
            24.0,
            "at_least",
            _default(HEADLINE, 32),
            _of(("transformers",), HEADLINE, 1),
        ),
        *int8,
    ]


def judge(rows: Sequence[Row]) -> list[Judged]:
    return [judged for aim in aims() if (judged := aim.judge(rows)) is not None]


def _of(families: Sequence[str], shape: Shape, concurrency: int) -> Callable[[Row], bool]:
    return lambda row: row.family in families and row.shape == str(shape) and row.concurrency == concurrency


def _default(shape: Shape, concurrency: int) -> Callable[[Row], bool]:
    """Ours with the default model as it comes, in either layout."""
    return lambda row: _of(("Diptych",), shape, concurrency)(row) and row.precision == "4 bits"


def _exact(shape: Shape, concurrency: int) -> Callable[[Row], bool]:
    return lambda row: _of(("Diptych",), shape, concurrency)(row) and row.precision == "float32"


def _verdict(reached: bool, ours: Row, theirs: Row) -> Verdict:
    if ours.figures.failed or (reached and theirs.figures.failed):
        return "no claim"
    return "met" if reached else "missed"


def _known(value: float | None) -> float:
    assert value is not None
    return value
