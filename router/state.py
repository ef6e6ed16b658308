"""What the router looks at and what it answers. Plain values: no I/O, no clock.

WorkerView, RouteRequest, RouteOptions  ->  route()  ->  Route, explained by its Offers
"""

from dataclasses import dataclass
from typing import Literal

Split = Literal["auto", "always", "never"]
Part = Literal["prefill", "decode", "alone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One live worker. The caller has added the work it sent that no report shows yet."""

    id: str
    prefills: bool
    decodes: bool
    ready: bool = True
    compatibility: str = ""  # opaque; KV moves only between workers with equal ones
    queued_prefill_tokens: int = 0
    running: int = 0  # sequences with blocks
    waiting: int = 0  # sequences without blocks yet
    blocks_available: int = 0  # free, or cached and evictable
    block_size: int = 16  # tokens
    prefill_ms_per_token: float = 0.0  # 0: not measured yet
    decode_step_ms: float = 0.0  # 0: not measured yet


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    prompt_tokens: int  # all tokens that need KV before the next one: for a resume, the delivered ones too
    max_tokens: int  # still to be generated
    excluded: frozenset[str] = frozenset()  # workers that already failed this request


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteOptions:
    """How to weigh costs.

    `split` "auto" compares P + D with D alone, "always" takes P + D where it can, "never" takes D
    alone. In "auto", D alone competes only when D would have to compute at most
    `local_prefill_tokens_max` tokens, or when no prefill worker can be paired with it: a long
    prefill belongs on a prefill worker even when D happens to be idle, because D's next
    sequences would wait for it.
    """

    split: Split = "auto"
    local_prefill_tokens_max: int = 64
    near_tie: float = 0.05  # costs within this share of the least are equal: one is drawn
    # One more RPC and its confirmation; then 46 KB per token (30 layers, 3 KV heads, float32) at 1 GB/s.
    transfer_ms: float = 2.0
    transfer_ms_per_token: float = 0.05
    # How much a millisecond that another sequence is delayed counts against one of our own.
    interference: float = 1.0
    # A decode step grows with its batch, hardly on a GPU and nearly linearly on a CPU: by this share
    # for each running sequence.
    step_growth: float = 0.1
    # Until any worker has measured; a worker that has not is taken to be like the average of the others.
    assumed_prefill_ms_per_token: float = 1.0
    assumed_decode_step_ms: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What it costs to give one worker one part of the request, in milliseconds."""

    worker: WorkerView
    part: Part
    cached_tokens: int
    queue_ms: float = 0.0  # prefills ahead of this one
    prefill_ms: float = 0.0  # the prompt's uncached tokens
    transfer_ms: float = 0.0  # KV that the decode worker lacks
    decode_ms: float = 0.0  # from KV in place to the first decode step's end
    interference_ms: float = 0.0  # delay of decoding by prefills, others' or this one's (see router/cost.py)

    @property
    def cost_ms(self) -> float:
        return self.queue_ms + self.prefill_ms + self.transfer_ms + self.decode_ms + self.interference_ms

    def __str__(self) -> str:
        names = ("queue_ms", "prefill_ms", "transfer_ms", "decode_ms", "interference_ms")
        terms = [f"{name[:-3]} {getattr(self, name):.1f}" for name in names if getattr(self, name)]
        cached = f", {self.cached_tokens} tokens cached" if self.cached_tokens else ""
        return f"{self.part} on {self.worker.id}: {self.cost_ms:.1f} ms ({' + '.join(terms)}{cached})"


@dataclass(frozen=True, slots=True)
class Route:
    """The chosen offers: prefill and decode, prefill only (one token), or one worker alone."""

    chosen: tuple[Offer, ...]
    considered: tuple[Offer, ...]  # every offer that was compared, the chosen ones among them

    @property
    def prefill(self) -> str | None:
        return self._worker("prefill")

    @property
    def decode(self) -> str | None:
        return self._worker("decode") or self._worker("alone")

    @property
    def cost_ms(self) -> float:
        return sum(offer.cost_ms for offer in self.chosen)

    @property
    def expected_ttft_ms(self) -> float:
        """Time to first token: it leaves the worker that computes the prompt, before any transfer."""
        return self.chosen[0].queue_ms + self.chosen[0].prefill_ms

    @property
    def reasons(self) -> list[str]:
        """One line per offer, the chosen ones first, then by cost."""
        others = sorted(
            (offer for offer in self.considered if offer not in self.chosen), key=lambda offer: offer.cost_ms
        )
        return [f"* {offer}" for offer in self.chosen] + [f"  {offer}" for offer in others]

    def _worker(self, part: Part) -> str | None:
        return next((offer.worker.id for offer in self.chosen if offer.part == part), None)
