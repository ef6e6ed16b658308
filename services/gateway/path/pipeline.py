"""THE request path: how one attempt of a request gets from tokens to tokens.

Layers around it add one concern each: `attempts` retries and resumes, `answer` makes text and finds
stop strings, `journal` keeps the times, `exchange` speaks HTTP and sees the client go.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager

import msgspec

from services.core.clock import Clock
from services.gateway.admission.place_queue import PlaceQueue
from services.gateway.admission.ticket import Ticket
from services.gateway.cluster.cluster_view import ClusterView
from services.gateway.cluster.expected_cache import Noted
from services.gateway.path.choices import Choices
from services.gateway.path.dispatch import dispatch
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
            arriving = dispatch(self._workers, sequence, placement, self._clock, ticket.deadline)
            async with aclosing(in_index_order(arriving, sequence.choices, choices)) as bursts:
                async for burst in bursts:
                    for event in burst:
                        expected.see(event)
                        self._queue.note(ticket, event)
                    yield burst
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


async def in_index_order(
    arriving: AsyncGenerator[list[WorkerEvent | AttemptFailed], None],
    served: Collection[int],
    choices: Choices,
) -> AsyncGenerator[list[Event], None]:
    """Events with each choice's tokens in order and without duplicates, until none of `served` goes on.

    The first tokens come from the prefill worker, the others from the decode worker, whose first
    may be here earlier: they are held. Other events pass through; the first tokens of a PrefillResult
    follow it as events of their own.
    """
    held: dict[tuple[int, int], OutputToken] = {}
    async with aclosing(arriving):
        async for burst in arriving:
            ordered: list[Event] = []
            for event in burst:
                if isinstance(event, OutputToken):
                    ordered += _deliver(event, held, choices)
                else:
                    ordered.append(event)
                if isinstance(event, PrefillResult):
                    for first in event.firsts:
                        ordered += _deliver(first, held, choices)
            if ordered:
                yield ordered
            if not any(map(choices.goes_on, served)):
                return


def _deliver(
    token: OutputToken, held: dict[tuple[int, int], OutputToken], choices: Choices
) -> list[OutputToken]:
    """The tokens of its choice whose turn it is with `token`: none, one, or those that were held for it."""
    choice, ready = token.choice, list[OutputToken]()
    if token.index > choices.next_index(choice):
        held[choice, token.index] = token
    elif token.index == choices.next_index(choice):
        next_one: OutputToken | None = token
        while next_one is not None and choices.goes_on(choice):
            choices.deliver(next_one)
            ready.append(next_one)
            next_one = held.pop((choice, choices.next_index(choice)), None)
    return ready
