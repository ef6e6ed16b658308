"""What each part of a request would cost on each worker, in milliseconds.

With n prompt tokens, c(w) of them cached on w, e(w) >= c(w) that will be once w has computed what waits
there, f(w) more that w fetches from another worker, and u(w) = max(1, n - e(w) - f(w)) to compute, all by w's
own step model:

    queue(w)     = token * queued tokens(w) + token_context * queued context(w) + steps * rest(w)
    prefill(w)   = token * u(w) + token_context * context of u(w) + steps * rest(w)
    steps        = chunks of at most chunk tokens(w), or of the time that decoding leaves if that is more
    rest(w)      = step, or a decode step of the sequences that w decodes: prompts share their steps
    fetch(w)     = fixed + f(w) * transfer ms per token, or 0 without a fetch
    transfer(D)  = fixed + (n - c(D)) * transfer ms per token
    decode(D)    = step + sequence * sequences(D) + context * context(D), with this request's choices
    late(D)      = over_target * (decode(D) - its target), or 0 within the target

    prefill on P = queue(P) + fetch(P) + prefill(P) + behind * waiting(P) * prefill(P)
    decode on D  = transfer(D) + decode(D) + late(D) + interference * (queue(D) / 2 + others(D) * decode(D))
    D alone      = queue(D) + fetch(D) + prefill(D) + decode(D) + late(D)
                   + interference * ((running(D) + coming(D)) * prefill(D) + others(D) * decode(D))

Queue, fetch and prefill are the time to the first token. The rest is what a choice costs others, or this
request later; with these the least sum serves all best, not the one at hand:

- What P computes delays whoever comes behind. How many will is seen in how many wait: a worker with a queue
  stays busy, for as many again. So the more wait, the more it counts to compute little: prompts go where
  their prefix is when workers are busy, and where they start at once when they are idle.
- D's step time is felt by all its sequences, so it counts once for each of the others(D) too. That makes
  the choice of D nearly a count of sequences, which suits equal workers: their fits differ by noise, and the
  least step time alone would always find the one that underestimates itself. Beyond its target each
  millisecond of a step counts `over_target` times.
- Prefills queued on D will interrupt this sequence there, but only half of them: D works them off while P
  computes. Alone, D delays each sequence it decodes by this prefill, and those that come meanwhile by half
  of it: coming(D) = prefill(D) / (2 * arrival). So short prompts, and those that D has cached, are
  D's where P would not be faster, and D helps with longer ones when the prefill workers have long queues.

Only the worker that computes finds what is coming: a decode worker takes its blocks at once, and nobody
can lend what is not there yet. A fetch is part of an offer when it takes clearly less time than computing
the same tokens would. Its source is the compatible worker that has most of the prompt; the load of the
source decides only between equals, since the worker that fetches gives up in time
(services/transfer/fetch.py). So a hot prefix spreads: a worker without it that has less to do fetches it, and
offers it from then on.

No term shrinks with any measure of load: more of it never makes a worker more attractive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.state import NOTHING, Fetch, Offer, RouteOptions, RouteRequest, WorkerView
from router.step_model import StepModel, average, context_of

SHARE_MIN = 0.1  # of a mixed step for prompts, however many sequences decode in it


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
        prefill_ms = self._prefill_ms(worker, fetch)
        return Offer(
            worker=worker,
            part="prefill",
            cached_tokens=self.expected(worker),
            queue_ms=self._queue_ms(worker),
            fetch=fetch,
            prefill_ms=prefill_ms,
            interference_ms=self.options.behind * worker.waiting * prefill_ms,
        )

    def decode(self, worker: WorkerView) -> Offer:
        lacking = self.request.prompt_tokens - self.cached(worker)
        decode_ms = self._decode_ms(worker)
        return Offer(
            worker=worker,
            part="decode",
            cached_tokens=self.cached(worker),
            transfer_ms=self.options.transfer_ms + lacking * self.options.transfer_ms_per_token,
            decode_ms=decode_ms,
            late_ms=self._late_ms(decode_ms),
            interference_ms=self.options.interference
            * (self._queue_ms(worker) / 2 + _others(worker) * decode_ms),
        )

    def alone(self, worker: WorkerView) -> Offer:
        fetch = self._fetch(worker)
        prefill_ms, decode_ms = self._prefill_ms(worker, fetch), self._decode_ms(worker)
        delayed = worker.running + prefill_ms / (2 * self.options.arrival_ms)
        return Offer(
            worker=worker,
            part="alone",
            cached_tokens=self.expected(worker),
            queue_ms=self._queue_ms(worker),
            fetch=fetch,
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
            late_ms=self._late_ms(decode_ms),
            interference_ms=self.options.interference * (delayed * prefill_ms + _others(worker) * decode_ms),
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
        tokens = worker.queued_prefill_tokens
        chunks = tokens / worker.chunk_tokens if worker.chunk_tokens else float(tokens > 0)
        return self._prompts_ms(worker, tokens, worker.queued_prefill_context, chunks)

    def _prefill_ms(self, worker: WorkerView, fetch: Fetch | None) -> float:
        tokens = self.to_compute(worker, fetch)
        context = context_of(tokens, self.request.prompt_tokens - tokens)
        chunks = -(-tokens // worker.chunk_tokens) if worker.chunk_tokens else 1
        return self._prompts_ms(worker, tokens, context, chunks)

    def _prompts_ms(self, worker: WorkerView, tokens: int, context: int, chunks: float) -> float:
        """In steps of their own, or beside the sequences that decode here."""
        model = self._model(worker)
        tokens_ms = model.tokens_ms(tokens, context)
        if not worker.running_context:
            return tokens_ms + chunks * model.step
        decode_ms = model.decode_ms(worker.running, worker.running_context)
        target_ms = self.options.decode_step_ms_target
        room_ms = max(target_ms - decode_ms, SHARE_MIN * target_ms)
        return tokens_ms + max(chunks, tokens_ms / room_ms) * decode_ms

    def _late_ms(self, decode_ms: float) -> float:
        return self.options.over_target * max(0.0, decode_ms - self.options.decode_step_ms_target)

    def _decode_ms(self, worker: WorkerView) -> float:
        """A step that decodes all who are here, in blocks or waiting for them, and this request."""
        choices = self.request.choices
        sequences = worker.running + worker.waiting + choices
        context = worker.running_context + choices * self.request.prompt_tokens
        return self._model(worker).decode_ms(sequences, context)

    def _model(self, worker: WorkerView) -> StepModel:
        return worker.model.completed(self.typical) if worker.model else self.typical


def _others(worker: WorkerView) -> int:
    """Sequences that decode here, or will."""
    return worker.running + worker.waiting


def _sources(lenders: Sequence[WorkerView], cached_tokens: Mapping[str, int]) -> dict[str, WorkerView]:
    """Of each group of compatible workers the one with most of the prompt cached; of equals the idlest."""

    def rank(worker: WorkerView) -> tuple[int, int, int, str]:
        cached = cached_tokens.get(worker.id, 0)
        return (cached, -worker.queued_prefill_tokens, -worker.running, worker.id)

    return {worker.compatibility: worker for worker in sorted(lenders, key=rank)}
