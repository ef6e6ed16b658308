"""The answers to all prompts of one request, as one stream.

Each prompt is a Generation of its own, with attempts, routes and retries of its own. To its client the
request is one: the n choices of prompt i are choices i * n to i * n + n - 1, nothing is computed before all
prompts are let in, and the failure of one ends all.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from services.core.clock import Clock
from services.core.stages import Stage
from services.gateway.admission.admission import Admission
from services.gateway.admission.place_queue import PlaceQueue
from services.gateway.admission.ticket import Ticket
from services.gateway.path.generation import Generation
from services.gateway.path.journal import Journal
from services.gateway.path.merge import merged
from services.gateway.text.answer import TextDelta


@dataclass(frozen=True, slots=True)
class Part:
    """One prompt's: what it waits with, and the deltas that come of it."""

    generation: Generation
    ticket: Ticket
    journal: Journal
    deltas: Callable[[], AsyncGenerator[list[TextDelta], None]]


class Answers:
    def __init__(self, parts: Sequence[Part], admission: Admission, queue: PlaceQueue, clock: Clock) -> None:
        self._parts, self._admission, self._queue, self._clock = parts, admission, queue, clock

    @asynccontextmanager
    async def streaming(self) -> AsyncIterator[AsyncGenerator[list[TextDelta], None]]:
        """Bursts of deltas. Raises Overloaded before any work is done; the stream what the first to fail
        raised."""
        try:
            for part in self._parts:
                await asyncio.sleep(0)  # to look for the places of hundreds of prompts holds up nobody else
                await self._admission.admit(part.ticket)
                one = part.generation
                part.journal.admit(len(one.prompt_ids), one.sampling.seed, wants_answer=one.wants_answer)
            async with aclosing(self._deltas()) as deltas:
                yield deltas
        finally:
            for part in self._parts:
                self._queue.leave(part.ticket)

    def _deltas(self) -> AsyncGenerator[list[TextDelta], None]:
        if len(self._parts) == 1:  # its choices have their numbers, and nobody waits for its end
            return self._parts[0].deltas()
        return merged(self._numbered(number) for number in range(len(self._parts)))

    async def _numbered(self, number: int) -> AsyncGenerator[list[TextDelta], None]:
        """The deltas of one prompt, with the numbers that choices have in the request."""
        part = self._parts[number]
        first_choice = sum(earlier.generation.choices for earlier in self._parts[:number])
        async with aclosing(part.deltas()) as bursts:
            async for burst in bursts:
                if first_choice:
                    burst = [replace(delta, choice=first_choice + delta.choice) for delta in burst]
                yield burst
        part.journal.end(Stage.FINISHED)
        self._note_progress()

    def _note_progress(self) -> None:
        """The request goes on, so those of its prompts that wait have not waited in vain."""
        for part in self._parts:
            if part.ticket.waiting:
                part.ticket.since = self._clock.now()
