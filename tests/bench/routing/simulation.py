"""One run: a cluster, a policy, a window of a trace; every request is answered, and what that took."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from router.state import RouteOptions
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from tests.bench.routing.gateway import REFRESH_S, Gateway
from tests.bench.routing.life import Life, Surroundings
from tests.bench.routing.step_table import Noise, StepTable
from tests.bench.routing.timeline import Timeline
from tests.bench.routing.traces import Request
from tests.bench.routing.worker import Reporting, Store, Worker

WARM_UP_S = 1.0  # of the first reports
# A run that takes so many times the window's own time has lost a request, or is far beyond overload.
LIMIT_FACTOR = 50.0
NEVER_S = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    prefill: int = 4
    decode: int = 4
    gateways: int = 1
    blocks: int = 2000  # of each worker's KV pool: too few for all prefixes of a window
    reporting: Reporting = field(default_factory=Reporting)
    noise: Noise = field(default_factory=Noise)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run brought. The first `warm_up` requests fill the caches and are not counted."""

    ttft_s: list[float]  # of each counted request, in order of arrival
    tpot_s: list[float]  # of each, time of a token after the first
    hit_rate: float  # cached + fetched tokens / prompt tokens
    fetched_share: float  # fetched tokens / prompt tokens
    alone_share: float  # requests that one worker computed alone
    retries: int  # attempts beyond each request's first
    prefill_busy_s: list[float]  # of each prefill worker, over the whole run
    duration_s: float  # from the first arrival to the last one
    ttft_error: float  # median of |expected / real - 1|

    @property
    def mean_ttft_s(self) -> float:
        return fmean(self.ttft_s)

    @property
    def p99_ttft_s(self) -> float:
        return float(np.percentile(self.ttft_s, 99))

    @property
    def mean_tpot_s(self) -> float:
        return fmean(self.tpot_s)

    @property
    def imbalance(self) -> float:
        """Work of the busiest prefill worker over the mean: 1 is perfect."""
        return max(self.prefill_busy_s) / fmean(self.prefill_busy_s)

    @property
    def utilisation(self) -> float:
        """Of the prefill workers while requests arrived."""
        return fmean(self.prefill_busy_s) / self.duration_s


class Simulation:
    def __init__(
        self, spec: ClusterSpec, options: RouteOptions, table: StepTable, block_size: int, seed: int
    ) -> None:
        self._spec = spec
        self._rng = random.Random(seed)
        self._timeline = Timeline()
        store = Store(
            MemoryPrefixIndex(self._timeline, ttl_s=NEVER_S), MemoryMembership(self._timeline, ttl_s=NEVER_S)
        )
        self.workers = {worker.key.worker_id: worker for worker in self._build(store, table, block_size)}
        self._gateways = [
            Gateway(store, options, self._timeline, random.Random(self._rng.random()))
            for _ in range(spec.gateways)
        ]
        self._around = Surroundings(
            self._timeline,
            self.workers,
            table,
            block_size,
            random.Random(self._rng.random()),
            self._on_end,
        )
        self._ended = 0

    def run(self, requests: Sequence[Request]) -> list[Life]:
        """Every request's life, in order of arrival. Raises AssertionError if one is lost."""
        for worker in self.workers.values():
            worker.start(self._rng.uniform(0.0, self._spec.reporting.every_s))
        for gateway in self._gateways:
            gateway.start(self._rng.uniform(0.0, REFRESH_S))
        lives = [
            Life(number, request, self._gateways[number % len(self._gateways)], self._around)
            for number, request in enumerate(requests)
        ]
        for life in lives:
            self._timeline.at(WARM_UP_S + life.request.at_s, life.begin)
        limit_s = WARM_UP_S + 600.0 + LIMIT_FACTOR * requests[-1].at_s
        self._timeline.run(
            until=lambda: self._ended == len(lives) and all(worker.idle for worker in self.workers.values()),
            limit_s=limit_s,
        )
        for worker in self.workers.values():
            worker.engine.check_integrity()
        return lives

    def _on_end(self, life: Life) -> None:
        self._ended += 1

    def _build(self, store: Store, table: StepTable, block_size: int) -> list[Worker]:
        spec = self._spec
        names = [f"p{n}" for n in range(spec.prefill)] + [f"d{n}" for n in range(spec.decode)]
        return [
            Worker(
                name,
                "prefill" if name.startswith("p") else "decode",
                block_size=block_size,
                blocks=spec.blocks,
                timeline=self._timeline,
                store=store,
                table=table,
                noise=spec.noise,
                reporting=spec.reporting,
                rng=random.Random(self._rng.random()),
            )
            for name in names
        ]


def simulate(
    requests: Sequence[Request],
    block_size: int,
    spec: ClusterSpec,
    options: RouteOptions,
    table: StepTable,
    seed: int,
    warm_up: int,
) -> Outcome:
    simulation = Simulation(spec, options, table, block_size, seed)
    lives = simulation.run(requests)
    counted = lives[warm_up:]
    prompt_tokens = sum(life.request.prompt_tokens for life in counted)
    cached = sum(life.cached_tokens for life in counted)
    fetched = sum(life.fetched_tokens for life in counted)
    ttfts_s = [_ttft_s(life) for life in counted]
    errors = [
        abs(life.expected_ttft_ms / 1e3 / ttft_s - 1) for life, ttft_s in zip(counted, ttfts_s, strict=True)
    ]
    return Outcome(
        ttft_s=ttfts_s,
        tpot_s=[(life.end_s - life.first_token_s) / (life.request.answer_tokens - 1) for life in counted],
        hit_rate=(cached + fetched) / prompt_tokens,
        fetched_share=fetched / prompt_tokens,
        alone_share=fmean(life.alone for life in counted),
        retries=sum(life.attempts - 1 for life in counted),
        prefill_busy_s=[w.work.busy_s for w in simulation.workers.values() if w.role == "prefill"],
        duration_s=requests[-1].at_s - requests[0].at_s,
        ttft_error=float(np.median(errors)),
    )


def _ttft_s(life: Life) -> float:
    return life.first_token_s - WARM_UP_S - life.request.at_s
