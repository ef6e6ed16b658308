"""All runs of the comparison: which there are, and running them in as many processes as there are cores.

Loads are shares of the rate that the prefill workers sustain. It is measured for each window of each trace:
runs at a low rate, with every prompt computed on a prefill worker, tell how long they compute for a request
with what their caches spare. The policy that needs least sets the rate:

    sustainable = prefill workers / min over policies (seconds computed per request)
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from router.state import Policy, RouteOptions
from tests.bench.routing.simulation import ClusterSpec, Outcome, simulate
from tests.bench.routing.step_table import StepTable, read_table
from tests.bench.routing.traces import TRACES, Request, Trace

POLICIES: tuple[Policy, ...] = ("cost", "prefix_aware", "least_loaded", "round_robin", "random")
LOADS = {"low": 0.4, "medium": 0.7, "high": 0.9}
CALIBRATION = "calibration"
CALIBRATION_LOAD = 0.4  # of what the workers would sustain without any cache
CALIBRATING: tuple[Policy, ...] = ("cost", "prefix_aware")  # the policies that may spare most


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    data: Path
    traces: tuple[str, ...] = tuple(TRACES)
    policies: tuple[Policy, ...] = POLICIES
    loads: tuple[str, ...] = tuple(LOADS)
    seeds: tuple[int, ...]
    requests: int
    warm_up: int  # of them, not counted
    gateways: int = 1  # more: `cost` on mooncake is run with so many as well
    spec: ClusterSpec = field(default_factory=ClusterSpec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One simulation. `rate`: requests a second."""

    trace: str
    load: str
    policy: Policy
    seed: int
    rate: float
    gateways: int = 1


@dataclass(frozen=True, slots=True)
class Done:
    run: Run
    outcome: Outcome


class Experiment:
    def __init__(self, plan: Plan, processes: int) -> None:
        self._plan = plan
        self._pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))

    def __enter__(self) -> "Experiment":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def results(self) -> Iterator[Done]:
        """Every run's outcome, as they are planned. The number of them is `self.size`."""
        rates = self._sustainable_rates()
        yield from self._outcomes(list(self._runs(rates)))

    @property
    def size(self) -> int:
        plan = self._plan
        runs = len(plan.traces) * len(plan.loads) * len(plan.policies) * len(plan.seeds)
        return runs + (len(plan.loads) * len(plan.seeds) if self._compares_gateways else 0)

    @property
    def _compares_gateways(self) -> bool:
        return self._plan.gateways > 1 and "mooncake" in self._plan.traces

    def _runs(self, rates: dict[tuple[str, int], float]) -> Iterator[Run]:
        plan = self._plan
        for trace in plan.traces:
            for load in plan.loads:
                for seed in plan.seeds:
                    rate = LOADS[load] * rates[trace, seed]
                    for policy in plan.policies:
                        yield Run(trace=trace, load=load, policy=policy, seed=seed, rate=rate)
                    if self._compares_gateways and trace == "mooncake":
                        yield Run(
                            trace=trace,
                            load=load,
                            policy="cost",
                            seed=seed,
                            rate=rate,
                            gateways=plan.gateways,
                        )

    def _sustainable_rates(self) -> dict[tuple[str, int], float]:
        """Requests a second, by trace and seed."""
        plan = self._plan
        table = read_table()
        runs = [
            Run(
                trace=trace,
                load=CALIBRATION,
                policy=policy,
                seed=seed,
                rate=CALIBRATION_LOAD * plan.spec.prefill / _uncached_s(plan, trace, seed, table),
            )
            for trace in plan.traces
            for seed in plan.seeds
            for policy in CALIBRATING
        ]
        needed_s: dict[tuple[str, int], float] = {}
        for done in self._outcomes(runs):
            key = done.run.trace, done.run.seed
            per_request_s = sum(done.outcome.prefill_busy_s) / plan.requests
            needed_s[key] = min(needed_s.get(key, per_request_s), per_request_s)
        return {key: plan.spec.prefill / seconds for key, seconds in needed_s.items()}

    def _outcomes(self, runs: Iterable[Run]) -> Iterator[Done]:
        listed = list(runs)
        plans = [self._plan] * len(listed)
        for run, outcome in zip(listed, self._pool.map(_outcome, plans, listed), strict=True):
            yield Done(run, outcome)


def _outcome(plan: Plan, run: Run) -> Outcome:
    return simulate(
        _window(plan, run.trace, run.seed, run.rate),
        _trace(plan.data, run.trace, run.seed).block_size,
        replace(plan.spec, gateways=run.gateways),
        options_of(run),
        read_table(),
        run.seed,
        plan.warm_up,
    )


def options_of(run: Run) -> RouteOptions:
    return RouteOptions(policy=run.policy, split="always" if run.load == CALIBRATION else "auto")


def _window(plan: Plan, trace: str, seed: int, rate: float) -> list[Request]:
    """The same for all policies and loads of a seed, but for the time between the requests."""
    return _trace(plan.data, trace, seed).window(plan.requests, rate, random.Random(seed))


@lru_cache(2)
def _trace(data: Path, name: str, seed: int) -> Trace:
    return TRACES[name](data, random.Random(seed))


def _uncached_s(plan: Plan, trace: str, seed: int, table: StepTable) -> float:
    """What an average request of the window would take to compute, without any cache."""
    return _mean_prefill_s(_window(plan, trace, seed, 1.0), table)


def _mean_prefill_s(requests: Sequence[Request], table: StepTable) -> float:
    chunk = table.prefill.size[-1]
    total_ms = 0.0
    for request in requests:
        for start in range(0, request.prompt_tokens, chunk):
            total_ms += table.prefill.at(min(chunk, request.prompt_tokens - start), start)
    return total_ms / len(requests) / 1e3
