"""What each part of a request would cost on each worker, in milliseconds.

With n prompt tokens, c(w) of them cached on w, f(w) more that w fetches from another worker, and
u(w) = max(1, n - c(w) - f(w)) to compute:

    queue(w)     = queued tokens(w) * ms per token(w)
    prefill(w)   = u(w) * ms per token(w)
    fetch(w)     = fixed + f(w) * transfer ms per token, or 0 without a fetch
    transfer(D)  = fixed + (n - c(D)) * transfer ms per token
    decode(D)    = step(D) * (1 + waiting(D) + growth * running(D))

    prefill on P = queue(P) + fetch(P) + prefill(P)
    decode on D  = transfer(D) + decode(D) + interference * queue(D) / 2
    D alone      = queue(D) + fetch(D) + prefill(D) + decode(D) + interference * running(D) * prefill(D)

A fetch is part of an offer when it takes clearly less time than computing the same tokens would. Its
source is the compatible worker that has most of the prompt; the load of the source decides only between
equals, since the worker that fetches gives up in time (services/transfer/fetch.py).

Interference is delay that one sequence's prefill puts on another's decoding. Prefills queued on D
will interrupt this sequence there, but only half of them: D works them off while P computes. For D
alone it is this prefill that delays each of the sequences D is decoding, and those ahead of it in
the queue are done by then. No term shrinks with any measure of load: more queue never makes a
worker more attractive.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from router.state import Fetch, Offer, RouteOptions, RouteRequest, WorkerView


@dataclass(frozen=True, slots=True)
class CostModel:
    """The costs of one request on one snapshot of the workers."""

    request: RouteRequest
    cached_tokens: Mapping[str, int]
    options: RouteOptions
    sources: Mapping[str, WorkerView]  # by compatibility, whose cache may be read
    typical_prefill_ms_per_token: float
    typical_decode_step_ms: float

    @classmethod
    def of(
        cls,
        request: RouteRequest,
        cached_tokens: Mapping[str, int],
        workers: Sequence[WorkerView],
        options: RouteOptions,
        lenders: Sequence[WorkerView] = (),
    ) -> "CostModel":
        return cls(
            request,
            cached_tokens,
            options,
            _sources(lenders, cached_tokens) if options.fetch else {},
            _typical(workers, lambda w: w.prefill_ms_per_token, options.assumed_prefill_ms_per_token),
            _typical(workers, lambda w: w.decode_step_ms, options.assumed_decode_step_ms),
        )

    def prefill(self, worker: WorkerView) -> Offer:
        fetch = self._fetch(worker)
        return Offer(
            worker=worker,
            part="prefill",
            cached_tokens=self.cached(worker),
            queue_ms=self._queue_ms(worker),
            fetch=fetch,
            prefill_ms=self._prefill_ms(worker, fetch),
        )

    def decode(self, worker: WorkerView) -> Offer:
        lacking = self.request.prompt_tokens - self.cached(worker)
        return Offer(
            worker=worker,
            part="decode",
            cached_tokens=self.cached(worker),
            transfer_ms=self.options.transfer_ms + lacking * self.options.transfer_ms_per_token,
            decode_ms=self._decode_ms(worker),
            interference_ms=self.options.interference * self._queue_ms(worker) / 2,
        )

    def alone(self, worker: WorkerView) -> Offer:
        fetch = self._fetch(worker)
        prefill_ms = self._prefill_ms(worker, fetch)
        return Offer(
            worker=worker,
            part="alone",
            cached_tokens=self.cached(worker),
            queue_ms=self._queue_ms(worker),
            fetch=fetch,
            prefill_ms=prefill_ms,
            decode_ms=self._decode_ms(worker),
            interference_ms=self.options.interference * worker.running * prefill_ms,
        )

    def cached(self, worker: WorkerView) -> int:
        return min(self.cached_tokens.get(worker.id, 0), self.request.prompt_tokens)

    def to_compute(self, worker: WorkerView, fetch: Fetch | None) -> int:
        """Tokens to compute: at least one, whose logits give the next token."""
        return max(1, self.request.prompt_tokens - self.cached(worker) - (fetch.tokens if fetch else 0))

    def _fetch(self, worker: WorkerView) -> Fetch | None:
        """Of what `worker` lacks and the best source has: whole blocks, and never the prompt's last token,
        which is computed in any case. None if that would not be worth it."""
        source = self.sources.get(worker.compatibility)
        if source is None:
            return None
        size = worker.block_size
        end = min(self.cached(source), self.request.prompt_tokens - 1) // size * size
        tokens = end - self.cached(worker)
        if tokens < self.options.fetch_blocks_min * size:
            return None
        ms = self.options.fetch_ms + tokens * self.options.transfer_ms_per_token
        worth_it = ms <= self.options.fetch_share_max * tokens * self._ms_per_token(worker)
        return Fetch(source.id, tokens, ms) if worth_it else None

    def _queue_ms(self, worker: WorkerView) -> float:
        return worker.queued_prefill_tokens * self._ms_per_token(worker)

    def _prefill_ms(self, worker: WorkerView, fetch: Fetch | None) -> float:
        return self.to_compute(worker, fetch) * self._ms_per_token(worker)

    def _ms_per_token(self, worker: WorkerView) -> float:
        return worker.prefill_ms_per_token or self.typical_prefill_ms_per_token

    def _decode_ms(self, worker: WorkerView) -> float:
        step_ms = worker.decode_step_ms or self.typical_decode_step_ms
        return step_ms * (1 + worker.waiting + self.options.step_growth * worker.running)


def _typical(workers: Sequence[WorkerView], measure: Callable[[WorkerView], float], assumed: float) -> float:
    measured = [measure(worker) for worker in workers if measure(worker) > 0]
    return fmean(measured) if measured else assumed


def _sources(lenders: Sequence[WorkerView], cached_tokens: Mapping[str, int]) -> dict[str, WorkerView]:
    """Of each group of compatible workers the one with most of the prompt cached; of equals the idlest."""

    def rank(worker: WorkerView) -> tuple[int, int, int, str]:
        cached = cached_tokens.get(worker.id, 0)
        return (cached, -worker.queued_prefill_tokens, -worker.running, worker.id)

    return {worker.compatibility: worker for worker in sorted(lenders, key=rank)}
