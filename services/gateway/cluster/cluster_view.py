"""What this gateway knows of the cluster: the workers' last reports, their caches, our own traffic.

Membership is polled into a snapshot. Redis may be away or may have lost everything; workers renew
their reports every 250 ms, so one that is missing for less than LEASE_GRACE_S is still taken to be
there, and no time counts while Redis does not answer.

A worker that was stopped is listed until its lease ends. It gets no new work as soon as its reports
stop changing (SILENT_S), or a connection to it has broken, until it is heard of again.
"""

import logging
import math
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import msgspec

from router.state import WorkerView
from services.core.block_hash import Compatibility, chain_hashes, chain_root
from services.core.clock import Clock
from services.core.errors import StoreUnavailable
from services.core.pairing import unpaired
from services.core.worker_report import Role, WorkerKey, WorkerReport
from services.gateway.cluster.expected_cache import ExpectedCache, Leading, Noted
from services.gateway.cluster.in_flight import InFlight
from services.gateway.workers.worker_client import WorkerClient
from services.index.protocol import PrefixIndex
from services.membership.protocol import Membership

logger = logging.getLogger(__name__)

LEASE_GRACE_S = 2.0
# A worker that was just lost is not offered for this long: its lease may still have time to run. One whose
# report changes HEARD_AGAIN_S later still lives, only the connection to it had broken.
SUSPICION_S = 3.0
HEARD_AGAIN_S = 0.5
# Of reports that did not change: several of the worker's periods, and more than a timeout of Redis.
SILENT_S = 1.25
# While Redis is away, what a worker had to do by its last report is held against it for so long: the work of
# others would never end, and answers would never give back what they had grown to. Who has no room says so.
LOAD_S = 5.0
# An index that did not answer (of a Redis Cluster one node may be gone) is not waited for again for so long.
INDEX_PAUSE_S = 1.0
# Workers publish their caches again when Redis is back: they look every 5 s whether their entries are there.
REPUBLISH_S = 6.0
# A request that waits for room asks where its prefix is cached many times a second, always with the
# same tokens: the hashes of so many prompts are kept.
CHAINS_KEPT = 256


class Located(NamedTuple):
    """Leading tokens of a prompt, by worker id."""

    cached: dict[str, int]  # in its cache: for itself, and for others who fetch them
    coming: dict[str, int]  # will be by the time the prompt's turn comes there: for itself only

    def add(self, cached: Mapping[WorkerKey, int], expected: Mapping[WorkerKey, Leading], size: int) -> None:
        """Blocks of `size` tokens."""
        for worker in {**cached, **expected}:
            there, coming = expected.get(worker, (0, 0))
            there = max(cached.get(worker, 0), there)
            self.cached[worker.worker_id] = there * size
            if coming > there:
                self.coming[worker.worker_id] = coming * size


class ClusterView:
    def __init__(
        self,
        membership: Membership,
        index: PrefixIndex,
        workers: WorkerClient,
        clock: Clock,
        served_model: str,
    ) -> None:
        self._membership, self._index, self._workers = membership, index, workers
        self._clock = clock
        self._served_model = served_model
        self._reports: dict[str, WorkerReport] = {}
        self._reported: dict[str, WorkerView] = {}  # what they say, for the router
        self._listed_at: dict[str, float] = {}
        self._looked_at = clock.now()  # at the last list of workers
        self._heard_at: dict[str, float] = {}  # when a worker's report last changed
        self._suspected_at: dict[WorkerKey, float] = {}
        self._store_answers = True
        self.unpaired: dict[str, str] = {}  # workers that no other one can share a request with, and why
        self._alike: set[tuple[str, Role, Compatibility]] = set()  # what that follows from
        self._other_models: dict[str, str] = {}  # by id of a worker that is left out for its model
        self._chain_hashes = lru_cache(CHAINS_KEPT)(_chain_hashes)
        self._index_asked_from = -math.inf
        self._republished_at = -math.inf  # until then the index may lack what workers hold
        self.in_flight = InFlight(clock)
        self.on_refresh: Callable[[], None] = lambda: None  # after every fresh snapshot
        self.expected_cache = ExpectedCache(clock)

    async def follow(self, every_s: float) -> None:
        """Refresh for ever."""
        while True:
            await self.refresh()
            await self._clock.sleep(every_s)

    async def refresh(self) -> None:
        """Take a new snapshot; when Redis is away, keep the last one."""
        listed = await self._list_workers()
        if listed is None:
            return
        now = self._looked_at = self._clock.now()
        for report in listed:
            self._take(report, now)
        for worker_id in [w for w, at in self._listed_at.items() if now - at > LEASE_GRACE_S]:
            del self._reports[worker_id], self._reported[worker_id]
            del self._listed_at[worker_id], self._heard_at[worker_id]
            self.in_flight.lost(worker_id)
            logger.warning("worker left the cluster", extra={"worker_id": worker_id})
        self._suspected_at = {key: at for key, at in self._suspected_at.items() if now - at < SUSPICION_S}
        self._find_unpaired()
        self.on_refresh()
        await self._workers.keep_only(self._reports.values())

    def _take(self, report: WorkerReport, now: float) -> None:
        before = self._reports.get(report.worker_id)
        counts_beats = report.beat > 0
        if before is None or before.beat != report.beat or not counts_beats:
            self._heard_at[report.worker_id] = now
            self.in_flight.heard(report)
        self._reports[report.worker_id] = report
        self._reported[report.worker_id] = _view_of(report)
        self._listed_at[report.worker_id] = now

    async def _list_workers(self) -> list[WorkerReport] | None:
        try:
            listed = await self._membership.workers()
        except StoreUnavailable as error:
            if self._store_answers:
                logger.warning("serving with the last known workers: %s", error.message)
            self._store_answers = False
            return None
        if not self._store_answers:
            logger.info("membership answers again")
            self._store_answers = True
            self._republished_at = self._clock.now() + REPUBLISH_S
            self._listed_at = dict.fromkeys(self._listed_at, self._clock.now())
            self._heard_at = dict(self._listed_at)
            self._suspected_at = dict.fromkeys(self._suspected_at, self._clock.now())
        self._warn_of_other_models(listed)
        return [report for report in listed if report.served_model == self._served_model]

    def _warn_of_other_models(self, listed: Sequence[WorkerReport]) -> None:
        """Once for each worker, until it changes its model or has been away."""
        others = {w.worker_id: w.served_model for w in listed if w.served_model != self._served_model}
        for worker_id, model in others.items():
            if self._other_models.get(worker_id) != model:
                logger.warning(
                    "worker %s is left out: it serves %r, this gateway serves %r",
                    *(worker_id, model, self._served_model),
                    extra={"worker_id": worker_id},
                )
        self._other_models = others

    def _find_unpaired(self) -> None:
        """Tells of each worker once, until its reason changes."""
        alike = {(w.worker_id, w.role, w.compatibility) for w in self._reports.values()}
        if alike == self._alike:
            return
        self._alike, before = alike, self.unpaired
        self.unpaired = unpaired(self.reports)
        for worker_id, why in self.unpaired.items():
            if before.get(worker_id) != why:
                logger.warning(
                    "%s shares no request with another worker: %s",
                    worker_id,
                    why,
                    extra={"worker_id": worker_id},
                )

    @property
    def ready(self) -> bool:
        """Whether a decode worker could take a request."""
        return any(report.decodes and report.state == "ready" for report in self._reports.values())

    @property
    def reports(self) -> list[WorkerReport]:
        return list(self._reports.values())

    def report(self, worker_id: str) -> WorkerReport:
        return self._reports[worker_id]

    def context_tokens_max(self, model_limit: int) -> int:
        """Prompt + output that every live worker can hold."""
        return min([model_limit, *(report.context_tokens_max for report in self._reports.values())])

    def suspect(self, worker: WorkerKey) -> None:
        """Do not offer this incarnation for a moment: a connection to it has just broken."""
        self._suspected_at[worker] = self._clock.now()

    def worker_views(self) -> list[WorkerView]:
        """For the router: what the workers have to do now, by their reports and our own work."""
        return [self.worker_view(worker_id) for worker_id in self._reports]

    def worker_view(self, worker_id: str) -> WorkerView:
        """The same of one worker."""
        report, view = self._reports[worker_id], self._reported[worker_id]
        if self._is_doubtful(report):
            view = replace(view, ready=False, lends=False)
        age_s = self._clock.now() - self._heard_at[report.worker_id] + report.load_age_ms / 1e3
        if age_s > LOAD_S and not self._store_answers:
            idle = _view_of(_without_load(report))
            return self.in_flight.alone_on(replace(idle, ready=view.ready, lends=view.lends))
        return self.in_flight.applied_to(view, age_s)

    def _is_doubtful(self, report: WorkerReport) -> bool:
        """Whether the worker may be stopped or dead although it is listed."""
        if self._is_silent(report):
            return True
        suspected_at = self._suspected_at.get(report.key)
        if suspected_at is None or self._heard_at[report.worker_id] >= suspected_at + HEARD_AGAIN_S:
            return False
        if self._clock.now() - suspected_at < SUSPICION_S:
            return True
        return not self._store_answers and self._is_replaceable(report)

    def _is_silent(self, report: WorkerReport) -> bool:
        return self._looked_at - self._heard_at[report.worker_id] > SILENT_S

    def _is_replaceable(self, report: WorkerReport) -> bool:
        """Whether others that nobody suspects do all that this worker does. While Redis does not answer,
        a suspect cannot be heard of again, and no lease ends: it is used only where it is needed."""
        others = [
            r
            for r in self._reports.values()
            if r.state == "ready" and r.key not in self._suspected_at and not self._is_silent(r)
        ]
        return (not report.prefills or any(other.prefills for other in others)) and (
            not report.decodes or any(other.decodes for other in others)
        )

    async def locate(self, token_ids: Sequence[int], salt: str) -> Located:
        """What each worker's cache holds of `token_ids`, or soon will: what the index says, and what this
        gateway's own requests have done that it does not show yet. Without Redis, what they ever did."""
        alike: defaultdict[Compatibility, list[WorkerKey]] = defaultdict(list)
        for report in self._reports.values():
            alike[report.compatibility].append(report.key)
        token_bytes = array("i", token_ids).tobytes()
        located = Located({}, {})
        for compatibility, workers in alike.items():
            chain = self._chain(token_bytes, compatibility, salt)
            if chain:
                blocks = await self._blocks(chain, workers)
                located.add(blocks, self.expected_cache.expected(chain, workers), compatibility.block_size)
        return located

    async def _blocks(self, chain: Sequence[bytes], workers: Sequence[WorkerKey]) -> dict[WorkerKey, int]:
        try:
            asks = self._store_answers and self._clock.now() >= self._index_asked_from
            blocks = await self._index.locate(chain, workers) if asks else {}
        except StoreUnavailable:
            blocks, self._index_asked_from = {}, self._clock.now() + INDEX_PAUSE_S
            self._republished_at = self._index_asked_from + REPUBLISH_S
        if not blocks or self._clock.now() < self._republished_at:
            for worker, kept in self.expected_cache.kept(chain, workers).items():
                blocks[worker] = max(kept, blocks.get(worker, 0))
        return blocks

    @contextmanager
    def expecting(
        self,
        prefill: WorkerReport | None,
        decode: WorkerReport | None,
        token_ids: Sequence[int],
        salt: str,
    ) -> Iterator[Noted]:
        """Around an attempt on these workers, which will have the KV of `token_ids` in their caches."""
        token_bytes = array("i", token_ids).tobytes()
        holders = [
            (report.key, self._chain(token_bytes, report.compatibility, salt)) if report else None
            for report in (prefill, decode)
        ]
        with self.expected_cache.noted(*holders) as noted:
            yield noted

    def _chain(self, token_bytes: bytes, compatibility: Compatibility, salt: str) -> list[bytes]:
        return self._chain_hashes(token_bytes, compatibility.block_size, chain_root(compatibility, salt))


def _view_of(report: WorkerReport) -> WorkerView:
    """What the report says, of a worker that nobody doubts."""
    return WorkerView(
        id=report.worker_id,
        prefills=report.prefills,
        decodes=report.decodes,
        ready=report.state == "ready",
        lends=report.state != "stalled",
        compatibility=msgspec.json.encode(report.compatibility.transferable).decode(),
        queued_prefill_tokens=report.queued_prefill_tokens,
        queued_prefill_context=report.queued_prefill_context,
        running=report.running,
        running_context=report.running_context,
        waiting=report.waiting,
        blocks_available=report.blocks_free + report.blocks_cached,
        block_size=report.compatibility.block_size,
        chunk_tokens=report.chunk_tokens_max,
        model=report.model,
    )


def _without_load(report: WorkerReport) -> WorkerReport:
    return msgspec.structs.replace(
        report,
        blocks_free=report.blocks_total,
        blocks_cached=0,
        running=0,
        waiting=0,
        queued_prefill_tokens=0,
        queued_prefill_context=0,
        running_context=0,
    )


def _chain_hashes(token_bytes: bytes, block_size: int, root: bytes) -> list[bytes]:
    """`chain_hashes` of native int32 token ids: bytes are a small cache key that is quickly compared."""
    return chain_hashes(array("i", token_bytes), block_size, root)
