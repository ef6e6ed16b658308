"""From outcomes to what is shown: one row per trace, load and policy, each compared with `cost`."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tests.bench.routing.experiment import Done
from tests.bench.routing.simulation import Outcome
from tests.bench.routing.statistics import Interval, paired_ratio

REFERENCE = "cost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Means over the seeds; the ratios are paired by seed, above 1 where `cost` is better."""

    trace: str
    load: str
    policy: str
    gateways: int
    seeds: int
    mean_ttft_s: float
    p99_ttft_s: float
    ttft_ratio: Interval  # mean TTFT / that of `cost`
    p99_ratio: Interval
    tpot_ratio: Interval
    hit_rate: float
    fetched_share: float
    alone_share: float
    imbalance: float
    utilisation: float
    tpot_ms: float
    retries: float
    ttft_error: float

    def as_dict(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("ttft_ratio", "p99_ratio", "tpot_ratio"):
            interval: Interval = plain[name]
            plain[name] = [interval.value, interval.low, interval.high]
        return plain


def compare(results: Iterable[Done]) -> list[Row]:
    """Rows in the order in which the policies first came."""
    groups: defaultdict[tuple[str, str, str, int], dict[int, Outcome]] = defaultdict(dict)
    for done in results:
        run = done.run
        groups[run.trace, run.load, run.policy, run.gateways][run.seed] = done.outcome
    return [
        _row(*key, list(outcomes.values()), _paired(groups[key[0], key[1], REFERENCE, 1], outcomes))
        for key, outcomes in groups.items()
    ]


def worse_than_best(rows: Sequence[Row]) -> list[str]:
    """Where another policy is better than `cost`, beyond the interval: one line each."""
    return [
        f"{row.trace}, {row.load} load: {row.policy} has a {what} of ×{ratio.value:.3f}"
        f" ({ratio.low:.3f} to {ratio.high:.3f}) of cost's"
        for row in rows
        if row.policy != REFERENCE
        for what, ratio in (
            ("mean TTFT", row.ttft_ratio),
            ("p99 TTFT", row.p99_ratio),
            ("mean TPOT", row.tpot_ratio),
        )
        if ratio.below_one
    ]


def _paired(reference: dict[int, Outcome], outcomes: dict[int, Outcome]) -> list[Outcome]:
    return [reference[seed] for seed in outcomes]


def _row(
    trace: str,
    load: str,
    policy: str,
    gateways: int,
    outcomes: Sequence[Outcome],
    reference: Sequence[Outcome],
) -> Row:
    def ratio(measure: Callable[[Outcome], float]) -> Interval:
        return paired_ratio([measure(o) for o in outcomes], [measure(o) for o in reference])

    return Row(
        trace=trace,
        load=load,
        policy=policy,
        gateways=gateways,
        seeds=len(outcomes),
        mean_ttft_s=fmean(o.mean_ttft_s for o in outcomes),
        p99_ttft_s=fmean(o.p99_ttft_s for o in outcomes),
        ttft_ratio=ratio(lambda o: o.mean_ttft_s),
        p99_ratio=ratio(lambda o: o.p99_ttft_s),
        tpot_ratio=ratio(lambda o: o.mean_tpot_s),
        hit_rate=fmean(o.hit_rate for o in outcomes),
        fetched_share=fmean(o.fetched_share for o in outcomes),
        alone_share=fmean(o.alone_share for o in outcomes),
        imbalance=fmean(o.imbalance for o in outcomes),
        utilisation=fmean(o.utilisation for o in outcomes),
        tpot_ms=1e3 * fmean(o.mean_tpot_s for o in outcomes),
        retries=fmean(o.retries for o in outcomes),
        ttft_error=fmean(o.ttft_error for o in outcomes),
    )
