"""What several seeds say together: means, and paired comparisons with an interval of confidence.

All policies of a seed see the same requests, so they are compared seed by seed: of n ratios r the estimate is
exp(mean log r), and the interval exp(mean ± t s / sqrt n) of Student's t with n - 1 degrees of freedom.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# Student's t for 95 %, two-sided, by degrees of freedom; beyond the table, the normal distribution's.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
        2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip
_NORMAL95 = 1.96


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and between what the true value lies with 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def above_one(self) -> bool:
        return self.low > 1.0

    @property
    def below_one(self) -> bool:
        return self.high < 1.0


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """numerator / denominator over pairs, all positive. One pair has no interval: it is infinite."""
    logs = [math.log(n / d) for n, d in zip(numerators, denominators, strict=True)]
    mean = fmean(logs)
    half = _half_width(logs)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half) if half < 700 else math.inf)


def mean_interval(values: Sequence[float]) -> Interval:
    mean, half = fmean(values), _half_width(values)
    return Interval(mean, mean - half, mean + half)


def _half_width(values: Sequence[float]) -> float:
    n = len(values)
    if n < 2:
        return math.inf
    t = _T95[n - 2] if n - 2 < len(_T95) else _NORMAL95
    return t * stdev(values) / math.sqrt(n)
