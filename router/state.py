"""What the router looks at and what it answers. Plain values: no I/O, no clock.

WorkerView, RouteRequest, RouteOptions  ->  route()  ->  Route, explained by its Offers
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from router.step_model import StepModel

ASSUMED = StepModel(step=20.0, token=1.0, sequence=2.0)  # a small model on a few cores
Split = Literal["auto", "always", "never"]
Policy = Literal["random", "round_robin", "least_loaded", "prefix_aware", "cost"]  # router/policy.py
Part = Literal["prefill", "decode", "alone"]
RouteKind = Literal["split", "decode_alone", "prefill_only"]
NOTHING: Mapping[str, int] = MappingProxyType({})  # tokens, by worker


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One live worker. The caller has added the work it sent that no report shows yet."""

    id: str
    prefills: bool
    decodes: bool
    ready: bool = True
    lends: bool = True  # others may read its cache: true of a draining worker, not of a suspected one
    compatibility: str = ""  # opaque; KV moves only between workers with equal ones
    queued_prefill_tokens: int = 0  # T of the step model, of all that is known but not computed
    queued_prefill_context: int = 0  # and its X
    running: int = 0  # sequences with blocks
    running_context: int = 0  # tokens of those that decode or are about to
    waiting: int = 0  # sequences without blocks yet
    blocks_available: int = 0  # free, or cached and evictable
    block_size: int = 16  # tokens
    chunk_tokens: int = 0  # prompt tokens that one step computes at most; 0: not known
    model: StepModel | None = None  # of its steps; None: nothing was measured yet


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    prompt_tokens: int  # all tokens that need KV before the next one: for a resume, the delivered ones too
    max_tokens: int  # still to be generated
    number: int = 0  # one more for each request of a gateway: what round_robin rotates by
    choices: int = 1  # answers to the one prompt, which share its blocks
    excluded: frozenset[str] = frozenset()  # workers that already failed this request
    apart: frozenset[tuple[str, str]] = frozenset()  # prefill and decode workers that failed it together


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteOptions:
    """How to weigh costs.

    `split` "auto" compares P + D with D alone, "always" takes P + D where it can, "never" takes D
    alone. Only the policy "cost" can compare them; the others take P + D where there is a pair.
    """

    policy: Policy = "cost"
    split: Split = "auto"
    # Of policy "cost": costs within this share of the least, and no more milliseconds above, are equal: one
    # is drawn. All who may compute a long prompt share most of its cost; what is left tells them apart.
    near_tie: float = 0.05
    near_tie_ms: float = 20.0
    # One more RPC and its confirmation; then 46 KB per token (30 layers, 3 KV heads, float32) at 1 GB/s.
    transfer_ms: float = 2.0
    transfer_ms_per_token: float = 0.05
    # A worker fetches a cached prefix from another one if that saves at least so many blocks and takes
    # at most this share of the time to compute them. The rest is a margin for what a snapshot does not
    # show: other transfers on the link, and blocks that were evicted meanwhile.
    fetch: bool = True
    fetch_blocks_min: int = 4
    fetch_share_max: float = 0.75
    # Three RPCs, and the wait for the source's engine, which answers between two steps: half of one on
    # average, and few workers are busy with steps of 100 ms, the target of mixed ones. Each token then
    # moves like any transfer's.
    fetch_ms: float = 20.0
    # How much a millisecond that another sequence is delayed counts against one before our own first token:
    # where it decodes on D, spread over its tokens; where it will come behind this one on P.
    interference: float = 0.5
    behind: float = 1.0
    arrival_ms: float = 1_000.0  # between two sequences that come to one decode worker, about
    # A worker's mixed steps aim at as much (WorkerConfig.step_ms_target).
    decode_step_ms_target: float = 45.0
    over_target: float = 10.0
    # Until any worker has measured; a worker that has not is taken to be like the average of the others.
    assumed: StepModel = ASSUMED


@dataclass(frozen=True, slots=True)
class Fetch:
    """The KV of `tokens` tokens, from the end of a worker's own cache on, read from another worker's."""

    source: str
    tokens: int
    ms: float


@dataclass(slots=True, kw_only=True)
class Offer:
    """What it costs to give one worker one part of the request, in milliseconds.

    Three are made for each worker and request: they are not frozen, which takes a third of the time.
    """

    worker: WorkerView
    part: Part
    cached_tokens: int  # when its turn comes
    queue_ms: float = 0.0  # prefills ahead of this one
    fetch: Fetch | None = None  # of a prefix that another worker has cached
    prefill_ms: float = 0.0  # the prompt's tokens that are neither cached nor fetched
    transfer_ms: float = 0.0  # KV that the decode worker lacks
    decode_ms: float = 0.0  # from KV in place to the first decode step's end
    late_ms: float = 0.0  # a decode step beyond its target, weighted
    interference_ms: float = 0.0  # what prefills delay: others' this one, this one's others (router/cost.py)
    score: float = 0.0  # by the policy: the least wins

    @property
    def fetch_ms(self) -> float:
        return self.fetch.ms if self.fetch else 0.0

    @property
    def ready_tokens(self) -> int:
        """Leading tokens that need not be computed."""
        return self.cached_tokens + (self.fetch.tokens if self.fetch else 0)

    @property
    def cost_ms(self) -> float:
        return (
            self.queue_ms
            + self.fetch_ms
            + self.prefill_ms
            + self.transfer_ms
            + self.decode_ms
            + self.late_ms
            + self.interference_ms
        )

    @property
    def _terms(self) -> list[tuple[str, float]]:
        return [
            ("queue", self.queue_ms),
            ("fetch", self.fetch_ms),
            ("prefill", self.prefill_ms),
            ("transfer", self.transfer_ms),
            ("decode", self.decode_ms),
            ("late", self.late_ms),
            ("interference", self.interference_ms),
        ]

    def __str__(self) -> str:
        notes = [" + ".join(f"{term} {cost:.1f}" for term, cost in self._terms if cost)]
        if self.cached_tokens:
            notes.append(f"{self.cached_tokens} tokens cached")
        if self.fetch:
            notes.append(f"{self.fetch.tokens} fetched from {self.fetch.source}")
        return f"{self.part} on {self.worker.id}: {self.cost_ms:.1f} ms ({', '.join(notes)})"


@dataclass(frozen=True, slots=True)
class Route:
    """The chosen offers: prefill and decode, prefill only (one token), or one worker alone."""

    chosen: tuple[Offer, ...]
    considered: tuple[Offer, ...]  # every offer that was compared, the chosen ones among them
    policy: Policy = "cost"

    @property
    def prefill(self) -> str | None:
        return self._worker("prefill")

    @property
    def decode(self) -> str | None:
        return self._worker("decode") or self._worker("alone")

    @property
    def kind(self) -> RouteKind:
        if self.decode is None:
            return "prefill_only"
        return "decode_alone" if self.prefill is None else "split"

    @property
    def computes(self) -> Offer:
        """The offer of the worker that computes the prompt."""
        return self.chosen[0]

    @property
    def cost_ms(self) -> float:
        return sum(offer.cost_ms for offer in self.chosen)

    @property
    def expected_ttft_ms(self) -> float:
        """Time to first token: it leaves the worker that computes the prompt, before any transfer."""
        first = self.computes
        return first.queue_ms + first.fetch_ms + first.prefill_ms

    @property
    def ranked(self) -> list[Offer]:
        """Every offer, the chosen ones first, then by score."""
        others = [offer for offer in self.considered if offer not in self.chosen]
        return [*self.chosen, *sorted(others, key=lambda offer: offer.score)]

    @property
    def reasons(self) -> list[str]:
        """One line per offer, ranked."""
        return [("* " if offer in self.chosen else "  ") + self._reason(offer) for offer in self.ranked]

    def _reason(self, offer: Offer) -> str:
        return str(offer) if self.policy == "cost" else f"{offer}, {self.policy} {offer.score:g}"

    def _worker(self, part: Part) -> str | None:
        return next((offer.worker.id for offer in self.chosen if offer.part == part), None)
