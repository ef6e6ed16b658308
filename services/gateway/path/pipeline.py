"""THE request path: how one attempt of a request gets from tokens to tokens.

Layers around it add one concern each: `attempts` retries and resumes, `answer` makes text and finds
stop strings, `journal` keeps the times, `exchange` speaks HTTP and sees the client go.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager

import msgspec

from services.core.clock import Clock
from services.gateway.admission.place_queue import PlaceQueue
from services.gateway.admission.ticket import Ticket
from services.gateway.cluster.cluster_view import ClusterView
from services.gateway.cluster.expected_cache import Noted
from services.gateway.path.choices import Choices
from services.gateway.path.dispatch import dispatched
from services.gateway.path.generation import AttemptFailed, Event, Routed, WorkerEvent
from services.gateway.workers.worker_client import OutputToken, PrefillResult, Sequence, WorkerClient


class Pipeline:
    def __init__(self, queue: PlaceQueue, view: ClusterView, workers: WorkerClient, clock: Clock) -> None:
        self._queue, self._view, self._workers, self._clock = queue, view, workers, clock

    async def attempt(self, ticket: Ticket) -> AsyncGenerator[list[Event], None]:
        """Routed alone, then the tokens of each choice in order up to its last; or AttemptFailed as the end.

        Raises Overloaded, NoWorker or DeadlineExceeded when the wait for a place is over.
        """
        choices, sequence = ticket.choices, ticket.sequence
        async with (
            self._queue.place(ticket) as placement,
            self._expecting(placement, ticket.sequence) as expected,
        ):
            yield [placement]
            sequence = msgspec.structs.replace(sequence, prefix=placement.prefix)
            calls = dispatched(self._workers, sequence, placement, self._clock, ticket.deadline)
            order, begun = IndexOrder(choices), False
            async with calls as arrivals:
                while True:
                    events = order.of(await arrivals.take())
                    for event in events:
                        if not (begun and isinstance(event, OutputToken)):  # later tokens tell nothing new
                            expected.see(event)
                            self._queue.note(ticket, event)
                            begun = begun or isinstance(event, OutputToken)
                    if events:
                        yield events
                    if _is_over(events, sequence, choices):
                        return
                    for choice in choices.take_unwanted(sequence.choices):
                        self._end_choice(placement, sequence, choice)

    @asynccontextmanager
    async def _expecting(self, placement: Routed, sequence: Sequence) -> AsyncIterator[Noted]:
        """The workers' caches will have the sequence's KV."""
        known_ids = sequence.prompt_ids + sequence.output_ids
        with self._view.expecting(placement.prefill, placement.decode, known_ids, sequence.salt) as expected:
            yield expected

    def _end_choice(self, placement: Routed, sequence: Sequence, choice: int) -> None:
        """The client has all it wants of this choice, for a stop string; the others go on."""
        if placement.decode is not None:
            self._workers.end_choice(placement.decode, sequence, choice)


def _is_over(events: list[Event], sequence: Sequence, choices: Choices) -> bool:
    """Whether the attempt has failed, or nobody wants more of any choice it serves."""
    failed = bool(events) and isinstance(events[-1], AttemptFailed)
    return failed or not any(map(choices.goes_on, sequence.choices))


class IndexOrder:
    """Puts each choice's tokens in order, without duplicates.

    The first tokens come from the prefill worker, the others from the decode worker, whose first
    may be here earlier: they are held.
    """

    def __init__(self, choices: Choices) -> None:
        self._choices = choices
        self._held: dict[tuple[int, int], OutputToken] = {}

    def of(self, arrived: Iterable[WorkerEvent | AttemptFailed]) -> list[Event]:
        """What `arrived` brings, until nobody wants more of a choice. Other events pass through; the first
        tokens of a PrefillResult follow it as events of their own."""
        ordered: list[Event] = []
        for event in arrived:
            if isinstance(event, OutputToken):
                self._deliver(event, ordered)
                continue
            ordered.append(event)
            if isinstance(event, PrefillResult):
                for first in event.firsts:
                    self._deliver(first, ordered)
        return ordered

    def _deliver(self, token: OutputToken, ordered: list[Event]) -> None:
        choice, next_index = token.choice, self._choices.next_index(token.choice)
        if token.index > next_index:
            self._held[choice, token.index] = token
        elif token.index == next_index:
            next_one: OutputToken | None = token
            while next_one is not None and self._choices.goes_on(choice):
                self._choices.deliver(next_one)
                ordered.append(next_one)
                next_one = self._held.pop((choice, self._choices.next_index(choice)), None)
