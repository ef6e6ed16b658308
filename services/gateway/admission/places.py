"""Finds a place for a sequence: the router's choice among workers that can begin with it soon.

A worker has a place for a prompt while its prefill queue is short, and one for answers while its free
blocks hold the prompt, the answers as long as they are expected to be, and what those that are there will
still grow by. More would wait in the workers' queues, first come first served, or be preempted in turn;
here it waits fairly, and is routed by what is known when its turn comes.
"""

import logging
import math
import random
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum

from router.route import route
from router.state import Route, RouteOptions, RouteRequest, WorkerView
from services.core.clock import Clock
from services.core.worker_report import WorkerKey, WorkerReport
from services.gateway.admission.commitments import Commitment, Commitments
from services.gateway.admission.forecast import AnswerLengths
from services.gateway.cluster.cluster_view import ClusterView, Located
from services.gateway.cluster.in_flight import Part
from services.gateway.path.choices import Choices
from services.gateway.path.generation import Excluded, Routed, WorkerPair
from services.gateway.workers.worker_client import PrefixSource, Sequence
from services.wire.convert import attempt_id

logger = logging.getLogger(__name__)

# A worker that has refused for lack of room is not asked again before something of ours ends there, or for
# so long: a report, which comes every 250 ms, may not show what it lacks.
REFUSAL_S = 0.1


Kept = frozenset[WorkerKey] | None


class Lack(Enum):
    """Why there is no place."""

    QUEUE = "queue"  # who could take it has enough to compute for now, which is soon over
    BLOCKS = "blocks"  # too few are free for this one; a smaller one might find a place
    WORKER = "worker"  # no live worker could ever take it


@dataclass(frozen=True, slots=True)
class PlaceLimits:
    """`queue_ms_max`: a worker gets no further prompt while those it has take longer. It must not run out of
    work while the next one is on its way: its decode worker makes room between two steps, of 100 ms by
    target, and reports are up to 250 ms old. `decode_share`: of the decode workers' blocks, how much may be
    promised to answers; above 1 some will be preempted."""

    queue_ms_max: float = 300.0
    decode_share: float = 1.0


@dataclass(slots=True, eq=False)
class Place:
    """Where a sequence goes. What it takes there counts until `release`."""

    routed: Routed
    commitment: Commitment
    taken_at: float
    prompt: Part | None = None  # until the first token is here
    refused_by: WorkerKey | None = None  # it had no room after all
    held: ExitStack = field(default_factory=ExitStack)  # what counts it

    def release(self) -> None:
        self.held.close()


class Places:
    def __init__(
        self,
        view: ClusterView,
        options: RouteOptions,
        limits: PlaceLimits,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._view, self._options, self._limits = view, options, limits
        self._clock, self._rng = clock, rng
        self.lengths = AnswerLengths()
        self.commitments = Commitments(self.lengths)
        self._refused_at: dict[WorkerKey, float] = {}
        self._taken = 0  # places, ever
        self._emptied_at = -math.inf  # when the last one that was taken had been given back
        self._seen: list[WorkerView] | None = None  # of all workers, while nothing can change
        self._kept: Collection[WorkerKey] = ()  # for somebody else

    def take(
        self,
        sequence: Sequence,
        choices: Choices,
        located: Located,
        excluded: Collection[Excluded],
    ) -> Place | Lack:
        """A place that counts as taken from now on."""
        chosen = self.find(self._request(sequence, excluded), located)
        if isinstance(chosen, Lack):
            return chosen
        self._taken += 1
        _explain(sequence, chosen)
        commitment = Commitment(
            chosen,
            choices,
            sequence.choices,
            answer_tokens=len(sequence.output_ids) + self.lengths.expected(sequence.tokens_left),
            tokens_max=sequence.sampling.max_tokens,
        )
        return self._counted(Place(self._routed(chosen), commitment, self._clock.now()), sequence)

    def retake(
        self,
        place: Place,
        sequence: Sequence,
        choices: Choices,
        located: Located,
        excluded: Collection[Excluded],
    ) -> Place:
        """Perhaps a better place than `place`, by what is cached now; else the same one."""
        place.release()
        better = self.take(sequence, choices, located, excluded)
        return self._counted(place, sequence) if isinstance(better, Lack) else better

    def find(self, request: RouteRequest, located: Located) -> Route | Lack:
        views = self._views()
        roomy = [self._with_blocks(view, request) for view in views]
        if request.max_tokens > 1 and not _decoding(roomy, request):  # no need to ask the router
            return Lack.BLOCKS if _decoding(views, request) else Lack.WORKER
        wanted = self._route(request, located, roomy)
        if wanted is None or self._is_makeshift(wanted, request, located, views):
            return Lack.BLOCKS if self._route(request, located, views) else Lack.WORKER
        if self._is_short(wanted.computes.worker):
            return wanted
        alone = _is_alone(wanted)
        soon = self._route(request, located, [self._with_short_queue(view, alone) for view in roomy])
        if soon is None or (_is_alone(soon) and not alone):
            return Lack.QUEUE
        # To wait there, for the sake of what is cached there, may be better than to begin elsewhere.
        waits = self._options.policy == "cost" and soon.cost_ms > wanted.cost_ms * (
            1 + self._options.near_tie
        )
        return wanted if waits else soon

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Around many calls of `take` between which nothing else happens: one look serves them all."""
        self._seen = self._view.worker_views()
        try:
            yield
        finally:
            self._seen = None

    @contextmanager
    def keeping(self, workers: Collection[WorkerKey]) -> Iterator[None]:
        """Around calls of `take` that shall not have these."""
        self._kept = workers
        try:
            yield
        finally:
            self._kept = ()

    def to_keep(self, sequence: Sequence, located: Located, excluded: Collection[Excluded]) -> Kept:
        """Workers that may be kept for a sequence which has long found no room, while others use the rest.
        None if these would be left without a worker for a part: then they have to wait too."""
        request = self._request(sequence, excluded)
        wanted = self._route(request, located, self._views())
        if wanted is None or wanted.decode is None:
            return None
        rest = [
            view for view in self._views() if view.ready and view.id not in (wanted.prefill, wanted.decode)
        ]
        if not any(view.decodes for view in rest):
            return None
        kept = {self._view.report(wanted.decode).key}
        if wanted.prefill is not None:
            report = self._view.report(wanted.prefill)
            if any(view.prefills for view in rest):
                kept.add(report.key)
            elif not self._holds_prompt(wanted.computes.worker, report, request):
                return None
        return frozenset(kept)

    def _views(self) -> list[WorkerView]:
        return self._view.worker_views() if self._seen is None else self._seen

    def _is_makeshift(
        self, wanted: Route, request: RouteRequest, located: Located, views: list[WorkerView]
    ) -> bool:
        """Whether a decode worker would do all only because the prefill workers' blocks are taken now."""
        if not _is_alone(wanted) or not any(view.prefills for view in views):
            return False
        ideal = self._route(request, located, views)
        return ideal is not None and not _is_alone(ideal)

    def _route(self, request: RouteRequest, located: Located, views: list[WorkerView]) -> Route | None:
        return route(request, located.cached, views, self._options, self._rng, located.coming)

    def ideal(self, sequence: Sequence, located: Located) -> Route | None:
        """Where it would go if all had room. None if no live worker could ever take it."""
        request = self._request(sequence, ())
        return self._route(request, located, self._view.worker_views())

    def kv_tokens(self, sequence: Sequence) -> int:
        """That it will have on a decode worker at its end, as far as can be expected."""
        return sequence.known_tokens + len(sequence.choices) * self.lengths.expected(sequence.tokens_left)

    @property
    def promised_tokens(self) -> int:
        """KV of all that is on decode workers, in tokens: what they have and will still grow by."""
        decoding = [view for view in self._view.worker_views() if view.decodes]
        return sum(self._promised_blocks(view) * view.block_size for view in decoding)

    def _promised_blocks(self, view: WorkerView) -> int:
        report = self._view.report(view.id)
        return (
            report.blocks_total - view.blocks_available + self.commitments.growth_blocks(report, view.running)
        )

    @property
    def idle_s(self) -> float:
        """For how long nothing of ours has been on any worker."""
        return 0.0 if len(self.commitments) else self._clock.now() - self._emptied_at

    def give_back(self, place: Place) -> None:
        """It is over. Its workers may have room again, except for one that has just said otherwise."""
        place.release()
        self._emptied_at = self._clock.now()
        for report in (place.routed.prefill, place.routed.decode):
            if report is not None and place.refused_by is None:
                self._refused_at.pop(report.key, None)
        if place.refused_by is not None:
            now = self._clock.now()
            self._refused_at = {key: at for key, at in self._refused_at.items() if now - at < REFUSAL_S}
            self._refused_at[place.refused_by] = now

    def _with_short_queue(self, view: WorkerView, alone: bool) -> WorkerView:
        """`view`, less what would have to wait for its queue: prefills, and answers that it does `alone`."""
        if self._is_short(view):
            return view
        return replace(view, prefills=False, decodes=view.decodes and not alone)

    def _with_blocks(self, view: WorkerView, request: RouteRequest) -> WorkerView:
        """`view` without the parts that it has no blocks for."""
        report = self._view.report(view.id)
        refused = self._clock.now() - self._refused_at.get(report.key, -REFUSAL_S) < REFUSAL_S
        if refused or report.key in self._kept:
            return replace(view, prefills=False, decodes=False)
        prefills = view.prefills and self._holds_prompt(view, report, request)
        decodes = view.decodes and _has_slots(view, report, request)
        decodes = decodes and self._holds_answers(view, report, request)
        if (prefills, decodes) == (view.prefills, view.decodes):
            return view
        return replace(view, prefills=prefills, decodes=decodes)

    def _is_short(self, view: WorkerView) -> bool:
        model = view.model.completed(self._options.assumed) if view.model else self._options.assumed
        tokens, context = view.queued_prefill_tokens, view.queued_prefill_context
        return model.queue_ms(tokens, context, view.chunk_tokens) <= self._limits.queue_ms_max

    def _holds_prompt(self, view: WorkerView, report: WorkerReport, request: RouteRequest) -> bool:
        needed = min(_blocks(request.prompt_tokens, view) + 1, report.blocks_total)
        return view.blocks_available >= needed

    def _holds_answers(self, view: WorkerView, report: WorkerReport, request: RouteRequest) -> bool:
        """Whoever needs more than all there is gets a place where nothing else is."""
        usable = int(report.blocks_total * self._limits.decode_share)
        grown = view.blocks_available - self.commitments.growth_blocks(report, view.running)
        answer = _blocks(self.lengths.expected(request.max_tokens), view)
        needed = min(_blocks(request.prompt_tokens, view) + request.choices * answer, usable)
        return grown - (report.blocks_total - usable) >= needed

    def _counted(self, place: Place, sequence: Sequence) -> Place:
        chosen = place.routed.route
        seq_id = attempt_id(sequence.request_id, sequence.attempt)
        sent = self._view.in_flight.sent(chosen, seq_id, sequence.known_tokens, len(sequence.choices))
        place.held.enter_context(self.commitments.made(place.commitment))
        place.prompt = place.held.enter_context(sent)
        if self._seen is not None:
            changed = {offer.worker.id for offer in chosen.chosen}
            self._seen = [
                self._view.worker_view(seen.id) if seen.id in changed else seen for seen in self._seen
            ]
        return place

    def _request(self, sequence: Sequence, excluded: Collection[Excluded]) -> RouteRequest:
        alive = {report.key for report in self._view.reports}
        return RouteRequest(
            prompt_tokens=sequence.known_tokens,
            max_tokens=sequence.tokens_left,
            number=self._taken,
            choices=len(sequence.choices),
            excluded=frozenset(key.worker_id for key in alive.intersection(excluded)),
            apart=frozenset(
                (pair.prefill.worker_id, pair.decode.worker_id)
                for pair in excluded
                if isinstance(pair, WorkerPair) and alive.issuperset(pair)
            ),
        )

    def _routed(self, chosen: Route) -> Routed:
        return Routed(
            route=chosen,
            prefill=self._view.report(chosen.prefill) if chosen.prefill else None,
            decode=self._view.report(chosen.decode) if chosen.decode else None,
            prefix=self._prefix(chosen),
        )

    def _prefix(self, chosen: Route) -> PrefixSource | None:
        offer = chosen.computes
        if offer.fetch is None:
            return None
        return PrefixSource(self._view.report(offer.fetch.source), offer.ready_tokens)


def _is_alone(chosen: Route) -> bool:
    return chosen.prefill is None


def _decoding(views: list[WorkerView], request: RouteRequest) -> bool:
    return any(view.ready and view.decodes and view.id not in request.excluded for view in views)


def _has_slots(view: WorkerView, report: WorkerReport, request: RouteRequest) -> bool:
    """For each choice to decode. More of them than there are slots run one after another."""
    taken, slots = view.running + view.waiting, report.sequences_max
    return not slots or taken == 0 or taken + request.choices <= slots


def _blocks(tokens: int, view: WorkerView) -> int:
    return -(-tokens // view.block_size)


def _explain(sequence: Sequence, chosen: Route) -> None:
    if logger.isEnabledFor(logging.DEBUG):
        context = {"request_id": sequence.request_id}
        logger.debug(
            "routed attempt %d, first token expected in %.0f ms:\n%s",
            *(sequence.attempt, chosen.expected_ttft_ms, "\n".join(chosen.reasons)),
            extra=context,
        )
