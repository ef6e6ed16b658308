"""THE request path: how one attempt of a request gets from tokens to tokens.

Layers around it add one concern each: `attempts` retries and resumes, `answer` makes text and finds
stop strings, `journal` keeps the times, `exchange` speaks HTTP and sees the client go.
"""

import logging
import random
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing

import msgspec

from router.route import route
from router.state import Route, RouteOptions, RouteRequest
from services.core.clock import Clock
from services.core.errors import NoWorker
from services.core.worker_report import WorkerKey
from services.gateway.cluster_view import ClusterView
from services.gateway.dispatch import dispatch
from services.gateway.generation import AttemptFailed, Event, Routed, WorkerEvent
from services.gateway.worker_client import OutputToken, PrefillResult, PrefixSource, Sequence, WorkerClient

logger = logging.getLogger(__name__)


class Pipeline:
    def __init__(
        self,
        view: ClusterView,
        workers: WorkerClient,
        options: RouteOptions,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._view, self._workers, self._options = view, workers, options
        self._clock, self._rng = clock, rng

    async def attempt(
        self, sequence: Sequence, excluded: Collection[WorkerKey], deadline: float
    ) -> AsyncGenerator[Event, None]:
        """Routed, then the answer's tokens in order up to the last one; or AttemptFailed as the end."""
        cached_tokens = await self._view.locate(sequence.prompt_ids + sequence.output_ids, sequence.salt)
        placement = self._place(sequence, cached_tokens, excluded)
        if placement is None:
            yield AttemptFailed(NoWorker("No worker can take the request now. Try again in a moment."))
            return
        with self._view.in_flight.sent(placement.route, sequence.known_tokens):
            yield placement
            sequence = msgspec.structs.replace(sequence, prefix=placement.prefix)
            arriving = dispatch(self._workers, sequence, placement, self._clock, deadline)
            async with aclosing(in_index_order(arriving, len(sequence.output_ids))) as events:
                async for event in events:
                    yield event

    def _place(
        self, sequence: Sequence, cached_tokens: dict[str, int], excluded: Collection[WorkerKey]
    ) -> Routed | None:
        request = RouteRequest(
            prompt_tokens=sequence.known_tokens,
            max_tokens=sequence.tokens_left,
            excluded=frozenset(r.worker_id for r in self._view.reports if r.key in excluded),
        )
        chosen = route(request, cached_tokens, self._view.worker_views(), self._options, self._rng)
        if chosen is None:
            return None
        if logger.isEnabledFor(logging.DEBUG):
            context = {"request_id": sequence.request_id}
            logger.debug(
                "routed attempt %d, first token expected in %.0f ms:\n%s",
                *(sequence.attempt, chosen.expected_ttft_ms, "\n".join(chosen.reasons)),
                extra=context,
            )
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


async def in_index_order(
    arriving: AsyncGenerator[WorkerEvent | AttemptFailed, None], next_index: int
) -> AsyncGenerator[WorkerEvent | AttemptFailed, None]:
    """Events with the tokens in order and without duplicates, up to the token that ends the answer.

    The first token comes from the prefill worker, the others from the decode worker, whose first
    may be here earlier: it is held. Other events pass through; the first token of a PrefillResult
    follows it as an event of its own.
    """
    held: dict[int, OutputToken] = {}
    async with aclosing(arriving):
        async for event in arriving:
            if not isinstance(event, OutputToken):
                yield event
            token = event.first if isinstance(event, PrefillResult) else event
            if isinstance(token, OutputToken) and token.index >= next_index:
                held.setdefault(token.index, token)
            while next_index in held:
                token = held.pop(next_index)
                next_index += 1
                yield token
                if token.finish is not None:
                    return
