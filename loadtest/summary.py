"""What a load test found, in numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.call import Outcome

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Summary:
    completed: int
    cancelled: int
    failed: int
    tokens: int  # of completed answers
    seconds: float
    first_token_s: tuple[float, ...]  # sorted, of streams
    gaps_s: tuple[float, ...]  # sorted, between two chunks of a stream
    kinds: dict[str, int]
    problems: dict[str, int]  # why requests failed, and how many

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], seconds: float) -> "Summary":
        ends = Counter(outcome.end for outcome in outcomes)
        return cls(
            completed=ends["completed"],
            cancelled=ends["cancelled"],
            failed=ends["failed"],
            tokens=sum(outcome.tokens for outcome in outcomes),
            seconds=seconds,
            first_token_s=tuple(sorted(o.first_token_s for o in outcomes if o.first_token_s is not None)),
            gaps_s=tuple(sorted(gap for outcome in outcomes for gap in outcome.gaps_s)),
            kinds=dict(Counter(outcome.kind for outcome in outcomes)),
            problems=dict(Counter(outcome.problem for outcome in outcomes if outcome.problem)),
        )

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        lines = [
            f"completed {self.completed}, cancelled {self.cancelled}, failed {self.failed}"
            f" in {self.seconds:.1f} s",
            f"tokens/s of completed answers: {rate:.1f}",
            f"time to first token (streams): {_percentiles(self.first_token_s)}",
            f"between two chunks:            {_percentiles(self.gaps_s)}",
        ]
        lines += [f"{count:5d} {kind}" for kind, count in sorted(self.kinds.items())]
        lines += [f"{count:5d} failed: {problem}" for problem, count in sorted(self.problems.items())]
        return "\n".join(lines)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile: the least value that `percent` of all do not exceed."""
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def _percentiles(ordered: Sequence[float]) -> str:
    if not ordered:
        return "none"
    return ", ".join(f"p{p} {percentile(ordered, p) * 1e3:.0f} ms" for p in PERCENTILES)
