"""One sequence's wish for a place on workers: what it needs, whose it is, and how long it may wait."""

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from services.gateway.admission.fair_queue import Priority
from services.gateway.admission.places import Kept, Place
from services.gateway.cluster.cluster_view import Located
from services.gateway.path.choices import Choices
from services.gateway.path.generation import Excluded
from services.gateway.workers.worker_client import Sequence


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    sequence: Sequence
    choices: Choices
    tenant: str
    priority: Priority
    since: float  # it waits without any progress
    deadline: float  # of the whole request
    first_token_by: float  # of a request that has none yet
    avoided: Callable[[], Collection[Excluded]] = tuple  # who has failed it of late
    had_turn: bool = False  # an attempt before, which found no room or failed: it does not queue again

    # What the index and the router say when it comes.
    located: Located = field(default_factory=lambda: Located({}, {}))
    located_at: float = 0.0
    cost: int = 1  # tokens that workers will compute for it
    service_ms: float = 0.0  # from a place to the first token, if nothing is before it there
    expected_ms: float = 0.0  # the same with what is before it

    # While it waits.
    entered_at: float = 0.0
    workerless_since: float | None = None
    blockless_since: float | None = None  # it had its turn, but nobody had room for one of its size
    kept: Kept = None  # workers that nobody else gets meanwhile
    waiting: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)  # the wait: it has a place, or an error
    place: Place | None = None
    error: Exception | None = None

    def again(self, sequence: Sequence) -> "Ticket":
        """For the next attempt, when this one has failed."""
        return Ticket(
            sequence=sequence,
            choices=self.choices,
            tenant=self.tenant,
            priority=self.priority,
            since=self.since,
            deadline=self.deadline,
            first_token_by=self.first_token_by,
            had_turn=True,
            cost=self.cost,
            service_ms=self.service_ms,
            expected_ms=self.expected_ms,
        )

    @property
    def begun(self) -> bool:
        """Its client has a part of the answer."""
        return any(self.choices.delivered[choice] for choice in self.sequence.choices)
