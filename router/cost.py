"""What each part of a request would cost on each worker, in milliseconds.

With n prompt tokens, c(w) of them cached on w, and u(w) = max(1, n - c(w)) to compute:

    queue(w)     = queued tokens(w) * ms per token(w)
    prefill(w)   = u(w) * ms per token(w)
    transfer(D)  = fixed + (n - c(D)) * transfer ms per token
    decode(D)    = step(D) * (1 + waiting(D) + growth * running(D))

    prefill on P = queue(P) + prefill(P)
    decode on D  = transfer(D) + decode(D) + interference * queue(D) / 2
    D alone      = queue(D) + prefill(D) + decode(D) + interference * running(D) * prefill(D)

Interference is delay that one sequence's prefill puts on another's decoding. Prefills queued on D
will interrupt this sequence there, but only half of them: D works them off while P computes. For D
alone it is this prefill that delays each of the sequences D is decoding, and those ahead of it in
the queue are done by then. No term shrinks with any measure of load: more queue never makes a
worker more attractive.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from router.state import Offer, RouteOptions, RouteRequest, WorkerView


@dataclass(frozen=True, slots=True)
class CostModel:
    """The costs of one request on one snapshot of the workers."""

    request: RouteRequest
    cached_tokens: Mapping[str, int]
    options: RouteOptions
    typical_prefill_ms_per_token: float
    typical_decode_step_ms: float

    @classmethod
    def of(
        cls,
        request: RouteRequest,
        cached_tokens: Mapping[str, int],
        workers: Sequence[WorkerView],
        options: RouteOptions,
    ) -> "CostModel":
        return cls(
            request,
            cached_tokens,
            options,
            _typical(workers, lambda w: w.prefill_ms_per_token, options.assumed_prefill_ms_per_token),
            _typical(workers, lambda w: w.decode_step_ms, options.assumed_decode_step_ms),
        )

    def prefill(self, worker: WorkerView) -> Offer:
        return Offer(
            worker=worker,
            part="prefill",
            cached_tokens=self.cached(worker),
            queue_ms=self._queue_ms(worker),
            prefill_ms=self._prefill_ms(worker),
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
        return Offer(
            worker=worker,
            part="alone",
            cached_tokens=self.cached(worker),
            queue_ms=self._queue_ms(worker),
            prefill_ms=self._prefill_ms(worker),
            decode_ms=self._decode_ms(worker),
            interference_ms=self.options.interference * worker.running * self._prefill_ms(worker),
        )

    def cached(self, worker: WorkerView) -> int:
        return min(self.cached_tokens.get(worker.id, 0), self.request.prompt_tokens)

    def uncached(self, worker: WorkerView) -> int:
        """Tokens to compute: at least one, whose logits give the next token."""
        return max(1, self.request.prompt_tokens - self.cached(worker))

    def _queue_ms(self, worker: WorkerView) -> float:
        return worker.queued_prefill_tokens * self._ms_per_token(worker)

    def _prefill_ms(self, worker: WorkerView) -> float:
        return self.uncached(worker) * self._ms_per_token(worker)

    def _ms_per_token(self, worker: WorkerView) -> float:
        return worker.prefill_ms_per_token or self.typical_prefill_ms_per_token

    def _decode_ms(self, worker: WorkerView) -> float:
        step_ms = worker.decode_step_ms or self.typical_decode_step_ms
        return step_ms * (1 + worker.waiting + self.options.step_growth * worker.running)


def _typical(workers: Sequence[WorkerView], measure: Callable[[WorkerView], float], assumed: float) -> float:
    measured = [measure(worker) for worker in workers if measure(worker) > 0]
    return fmean(measured) if measured else assumed
