"""What each part of a request would cost on each worker, in milliseconds.

With n prompt tokens, c(w) of them cached on w, e(w) >= c(w) that will be once w has computed what waits
there, f(w) more that w fetches from another worker, and u(w) = max(1, n - e(w) - f(w)) to compute:

    queue(w)     = step * steps + token * queued tokens(w) + token_context * queued context(w)
    prefill(w)   = step * steps + token * u(w) + token_context * context of u(w)
    fetch(w)     = fixed + f(w) * transfer ms per token, or 0 without a fetch
    transfer(D)  = fixed + (n - c(D)) * transfer ms per token
    decode(D)    = step + sequence * sequences(D) + context * context(D), with this request's choices

    prefill on P = queue(P) + fetch(P) + prefill(P)
    decode on D  = transfer(D) + decode(D) + interference * queue(D) / 2
    D alone      = queue(D) + fetch(D) + prefill(D) + decode(D) + interference * running(D) * prefill(D)

Only the worker that computes finds what is coming: a decode worker takes its blocks at once, and nobody
can lend what is not there yet. A fetch is part of an offer when it takes clearly less time than computing
the same tokens would. Its source is the compatible worker that has most of the prompt; the load of the
source decides only between equals, since the worker that fetches gives up in time
(services/transfer/fetch.py).

Interference is delay that one sequence's prefill puts on another's decoding. Prefills queued on D
will interrupt this sequence there, but only half of them: D works them off while P computes. For D
alone it is this prefill that delays each of the sequences D is decoding, and those ahead of it in
the queue are done by then. No term shrinks with any measure of load: more queue never makes a
worker more attractive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.state import NOTHING, Fetch, Offer, RouteOptions, RouteRequest, WorkerView
from router.step_model import StepModel, average, context_of


@dataclass(frozen=True, slots=True)
class CostModel:
    """The costs of one request on one snapshot of the workers."""

    request: RouteRequest
    cached_tokens: Mapping[str, int]
    coming_tokens: Mapping[str, int]
    options: RouteOptions
    sources: Mapping[str, WorkerView]  # by compatibility, whose cache may be read
    typical: StepModel  # of a worker that has not measured

    @classmethod
    def of(
        cls,
        request: RouteRequest,
        cached_tokens: Mapping[str, int],
        workers: Sequence[WorkerView],
        options: RouteOptions,
        lenders: Sequence[WorkerView] = (),
        coming_tokens: Mapping[str, int] = NOTHING,
    ) -> "CostModel":
        return cls(
            request,
            cached_tokens,
            coming_tokens,
            options,
            _sources(lenders, cached_tokens) if options.fetch else {},
            average([worker.model for worker in workers if worker.model], options.assumed),
        )

    def prefill(self, worker: WorkerView) -> Offer:
        fetch = self._fetch(worker)
        return Offer(
            worker=worker,
            part="prefill",
            cached_tokens=self.expected(worker),
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
            cached_tokens=self.expected(worker),
            queue_ms=self._queue_ms(worker),
            fetch=fetch,
            prefill_ms=prefill_ms,
            decode_ms=self._decode_ms(worker),
            interference_ms=self.options.interference * worker.running * prefill_ms,
        )

    def cached(self, worker: WorkerView) -> int:
        return min(self.cached_tokens.get(worker.id, 0), self.request.prompt_tokens)

    def expected(self, worker: WorkerView) -> int:
        """Cached when the prompt's turn comes there."""
        return max(self.cached(worker), min(self.coming_tokens.get(worker.id, 0), self.request.prompt_tokens))

    def to_compute(self, worker: WorkerView, fetch: Fetch | None) -> int:
        """Tokens to compute: at least one, whose logits give the next token."""
        return max(1, self.request.prompt_tokens - self.expected(worker) - (fetch.tokens if fetch else 0))

    def _fetch(self, worker: WorkerView) -> Fetch | None:
        """Of what `worker` lacks and the best source has: whole blocks, and never the prompt's last token,
        which is computed in any case. None if that would not be worth it."""
        source = self.sources.get(worker.compatibility)
        if source is None:
            return None
        size = worker.block_size
        end = min(self.cached(source), self.request.prompt_tokens - 1) // size * size
        tokens = end - self.expected(worker)
        if tokens < self.options.fetch_blocks_min * size:
            return None
        ms = self.options.fetch_ms + tokens * self.options.transfer_ms_per_token
        compute_ms = self._model(worker).tokens_ms(tokens, context_of(tokens, self.expected(worker)))
        worth_it = ms <= self.options.fetch_share_max * compute_ms
        return Fetch(source.id, tokens, ms) if worth_it else None

    def _queue_ms(self, worker: WorkerView) -> float:
        tokens, context = worker.queued_prefill_tokens, worker.queued_prefill_context
        return self._model(worker).queue_ms(tokens, context, worker.chunk_tokens)

    def _prefill_ms(self, worker: WorkerView, fetch: Fetch | None) -> float:
        tokens = self.to_compute(worker, fetch)
        start = self.request.prompt_tokens - tokens
        return self._model(worker).prefill_ms(tokens, start, worker.chunk_tokens)

    def _decode_ms(self, worker: WorkerView) -> float:
        """A step that decodes all who are here, in blocks or waiting for them, and this request."""
        choices = self.request.choices
        sequences = worker.running + worker.waiting + choices
        context = worker.running_context + choices * self.request.prompt_tokens
        return self._model(worker).decode_ms(sequences, context)

    def _model(self, worker: WorkerView) -> StepModel:
        return worker.model.completed(self.typical) if worker.model else self.typical


def _sources(lenders: Sequence[WorkerView], cached_tokens: Mapping[str, int]) -> dict[str, WorkerView]:
    """Of each group of compatible workers the one with most of the prompt cached; of equals the idlest."""

    def rank(worker: WorkerView) -> tuple[int, int, int, str]:
        cached = cached_tokens.get(worker.id, 0)
        return (cached, -worker.queued_prefill_tokens, -worker.running, worker.id)

    return {worker.compatibility: worker for worker in sorted(lenders, key=rank)}
