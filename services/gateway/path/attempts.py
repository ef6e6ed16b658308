"""Retry and resume: an answer that goes on elsewhere when a worker fails.

A new attempt carries the tokens already delivered. With the seed fixed, it goes on with exactly the
tokens that the failed one would have given, so the client sees nothing but a pause.

Choices of one prompt share an attempt for as long as they have delivered the same tokens: at first all
of them do. If it fails later, each goes on by itself, with a route and failures of its own; what they
share is found in the workers' prefix caches.
"""

import itertools
import logging
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Many
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, replace

from services.core.clock import Clock
from services.core.errors import (
    BadRequest,
    DiptychError,
    Draining,
    Overloaded,
    RoleChanged,
    WorkerLost,
    facts,
)
from services.gateway.admission.ticket import Ticket
from services.gateway.cluster.cluster_view import ClusterView
from services.gateway.path.choices import Choices
from services.gateway.path.generation import AttemptFailed, Event, Excluded, Generation
from services.gateway.path.merge import merged
from services.gateway.path.pipeline import Pipeline
from services.gateway.workers.worker_client import OutputToken, Sequence

logger = logging.getLogger(__name__)

# A failed worker, or a pair that did not find each other, is avoided for this long by the request it
# failed; then it has recovered, or has lost its lease if it is dead. A cluster that has no other worker
# must be able to use it again.
EXCLUSION_S = 3.0
# One that sends work away because it drains or has another role says so in its report by then.
SENT_AWAY_S = 0.5


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    attempts_max: int = 4  # that fail without a token between them; a long stream may survive more faults
    attempts_total_max: int = 16  # that fail at all, so that no request goes round for ever


class Patience:
    """Whether one request, or one choice of it, may try again, which workers it avoids, and since when it
    waits without any progress."""

    def __init__(self, policy: RetryPolicy, clock: Clock) -> None:
        self._policy, self._clock = policy, clock
        self._failures = 0  # since the last token
        self._failures_total = 0
        self._excluded_until: dict[Excluded, float] = {}
        self._waiting_since: float | None = clock.now()
        self.blockless_since: float | None = None

    def excluded(self) -> set[Excluded]:
        now = self._clock.now()
        return {avoided for avoided, end in self._excluded_until.items() if end > now}

    @property
    def waiting_since(self) -> float:
        if self._waiting_since is None:
            self._waiting_since = self._clock.now()
        return self._waiting_since

    def note(self, event: Event) -> None:
        """Only a token is progress, after which failures and waiting are counted anew."""
        if isinstance(event, OutputToken):
            self._waiting_since = self.blockless_since = None
            self._failures = 0

    def fork(self) -> "Patience":
        """For a part of the request that goes on by itself: it has failed as often as the whole."""
        fork = copy(self)
        fork._excluded_until = dict(self._excluded_until)
        return fork

    def admit_failure(self, failed: AttemptFailed) -> None:
        """Take note of a failed attempt. Raises its error when no other one may follow."""
        if not facts(failed.error).retryable:
            raise failed.error
        if lacks_capacity(failed.error):
            if self.blockless_since is None:
                self.blockless_since = self._clock.now()
            return
        self._failures_total += 1
        if not is_sent_away(failed.error):
            self._failures += 1
        if (
            self._failures >= self._policy.attempts_max
            or self._failures_total >= self._policy.attempts_total_max
        ):
            raise failed.error
        if failed.to_avoid is not None:
            avoided_s = SENT_AWAY_S if is_sent_away(failed.error) else EXCLUSION_S
            self._excluded_until[failed.to_avoid] = self._clock.now() + avoided_s


def lacks_capacity(error: DiptychError) -> bool:
    return isinstance(error, Overloaded)


def is_sent_away(error: DiptychError) -> bool:
    """Nothing has failed: the worker wants the work to be done elsewhere."""
    return isinstance(error, Draining | RoleChanged)


class Attempts:
    """All attempts at one request. `choices` keeps what they deliver, `first` is in the queue already."""

    def __init__(
        self,
        generation: Generation,
        choices: Choices,
        first: Ticket,
        pipeline: Pipeline,
        view: ClusterView,
    ) -> None:
        self._generation, self._choices, self._first = generation, choices, first
        self._pipeline, self._view = pipeline, view
        self._numbers = itertools.count(2)

    def events(self, patience: Patience) -> AsyncGenerator[list[Event], None]:
        """The events of as many attempts as it takes; each failed one that is followed by another ends
        with AttemptFailed. Raises the error of the last one, or of a wait for a place that was in vain.
        """
        return self._events(range(len(self._choices)), patience, self._first)

    async def _events(
        self, served: Many[int], patience: Patience, first: Ticket | None = None
    ) -> AsyncGenerator[list[Event], None]:
        while len(groups := self._choices.alike(served)) == 1:
            failed: AttemptFailed | None = None
            ticket, first = first or self._next_ticket(groups[0], patience), None
            async with aclosing(self._pipeline.attempt(ticket)) as bursts:
                async for burst in bursts:
                    if isinstance(last := burst[-1], AttemptFailed):
                        failed, burst = last, burst[:-1]
                    for event in burst:
                        patience.note(event)
                    if burst:
                        yield burst
                    if failed is not None:
                        break
            if failed is None:
                return
            _note(ticket.sequence, failed, self._view)
            patience.admit_failure(failed)
            yield [replace(failed, others_go_on=len(served) < len(self._choices))]
        async with aclosing(merged(self._events(group, patience.fork()) for group in groups)) as together:
            async for burst in together:
                yield burst

    def _next_ticket(self, choices: tuple[int, ...], patience: Patience) -> Ticket:
        delivered = self._choices.delivered[choices[0]]
        return replace(
            self._first.again(self._generation.sequence(next(self._numbers), choices, delivered)),
            since=patience.waiting_since,
            blockless_since=patience.blockless_since,
            avoided=patience.excluded,
        )


def _note(sequence: Sequence, failed: AttemptFailed, view: ClusterView) -> None:
    worker_id = failed.culprit.worker_id if failed.culprit else None
    if isinstance(failed.error, WorkerLost) and failed.culprit is not None:
        view.suspect(failed.culprit.key)
    expected = lacks_capacity(failed.error) or is_sent_away(failed.error)
    level = logging.DEBUG if expected else logging.WARNING
    context = {"request_id": sequence.request_id, "worker_id": worker_id}
    # What is wrong with a request may quote it: that is for its client.
    reason = facts(failed.error).label if isinstance(failed.error, BadRequest) else failed.error.message
    logger.log(level, "attempt %d failed: %s", sequence.attempt, reason, extra=context)
