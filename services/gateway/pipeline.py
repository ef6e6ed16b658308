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
from services.gateway.choices import Choices
from services.gateway.cluster_view import ClusterView, Located
from services.gateway.dispatch import dispatch
from services.gateway.generation import AttemptFailed, Event, Excluded, Routed, WorkerEvent, WorkerPair
from services.gateway.worker_client import OutputToken, PrefillResult, PrefixSource, Sequence, WorkerClient
from services.wire.convert import attempt_id

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
        self._placed = 0

    async def attempt(
        self, sequence: Sequence, choices: Choices, excluded: Collection[Excluded], deadline: float
    ) -> AsyncGenerator[Event, None]:
        """Routed, then the tokens of each choice in order up to its last; or AttemptFailed as the end."""
        known_ids = sequence.prompt_ids + sequence.output_ids
        located = await self._view.locate(known_ids, sequence.salt)
        placement = self._place(sequence, located, excluded)
        if placement is None:
            yield AttemptFailed(NoWorker("No worker can take the request now. Try again in a moment."))
            return
        seq_id = attempt_id(sequence.request_id, sequence.attempt)
        with (
            self._view.in_flight.sent(
                placement.route, seq_id, sequence.known_tokens, len(sequence.choices)
            ) as computing,
            self._view.expecting(placement.prefill, placement.decode, known_ids, sequence.salt) as expected,
        ):
            yield placement
            sequence = msgspec.structs.replace(sequence, prefix=placement.prefix)
            arriving = dispatch(self._workers, sequence, placement, self._clock, deadline)
            async with aclosing(in_index_order(arriving, sequence.choices, choices)) as events:
                async for event in events:
                    expected.see(event)
                    if isinstance(event, PrefillResult | OutputToken):
                        computing.prefilled()
                    yield event
                    for choice in choices.take_unwanted(sequence.choices):
                        self._end_choice(placement, sequence, choice)

    def route(
        self, sequence: Sequence, located: Located, excluded: Collection[Excluded] = ()
    ) -> Route | None:
        """Where it would go now; nothing is reserved there. None if no worker can take it."""
        request, views = self._request(sequence, excluded), self._view.worker_views()
        return route(request, located.cached, views, self._options, self._rng, located.coming)

    def _request(self, sequence: Sequence, excluded: Collection[Excluded]) -> RouteRequest:
        alive = {report.key for report in self._view.reports}
        return RouteRequest(
            prompt_tokens=sequence.known_tokens,
            max_tokens=sequence.tokens_left,
            number=self._placed,
            choices=len(sequence.choices),
            excluded=frozenset(key.worker_id for key in alive.intersection(excluded)),
            apart=frozenset(
                (pair.prefill.worker_id, pair.decode.worker_id)
                for pair in excluded
                if isinstance(pair, WorkerPair) and alive.issuperset(pair)
            ),
        )

    def _place(self, sequence: Sequence, located: Located, excluded: Collection[Excluded]) -> Routed | None:
        chosen = self.route(sequence, located, excluded)
        if chosen is None:
            return None
        self._placed += 1
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

    def _end_choice(self, placement: Routed, sequence: Sequence, choice: int) -> None:
        """The client has all it wants of this choice, for a stop string; the others go on."""
        if placement.decode is not None:
            self._workers.end_choice(placement.decode, sequence, choice)


async def in_index_order(
    arriving: AsyncGenerator[WorkerEvent | AttemptFailed, None], served: Collection[int], choices: Choices
) -> AsyncGenerator[WorkerEvent | AttemptFailed, None]:
    """Events with each choice's tokens in order and without duplicates, until none of `served` goes on.

    The first tokens come from the prefill worker, the others from the decode worker, whose first
    may be here earlier: they are held. Other events pass through; the first tokens of a PrefillResult
    follow it as events of their own.
    """
    held: dict[tuple[int, int], OutputToken] = {}
    async with aclosing(arriving):
        async for event in arriving:
            if not isinstance(event, OutputToken):
                yield event
            for token in _tokens(event):
                choice = token.choice
                if token.index >= choices.next_index(choice):
                    held.setdefault((choice, token.index), token)
                while choices.goes_on(choice) and (choice, choices.next_index(choice)) in held:
                    token = held.pop((choice, choices.next_index(choice)))
                    choices.deliver(token)
                    yield token
            if not any(map(choices.goes_on, served)):
                return


def _tokens(event: WorkerEvent | AttemptFailed) -> tuple[OutputToken, ...]:
    if isinstance(event, PrefillResult):
        return event.firsts
    return (event,) if isinstance(event, OutputToken) else ()
