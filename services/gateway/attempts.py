"""Retry and resume: an answer that goes on elsewhere when a worker fails.

A new attempt carries the tokens already delivered. With the seed fixed, it goes on with exactly the
tokens that the failed one would have given, so the client sees nothing but a pause.

Choices of one prompt share an attempt for as long as they have delivered the same tokens: at first all
of them do. If it fails later, each goes on by itself, with a route and failures of its own; what they
share is found in the workers' prefix caches.
"""

import itertools
import logging
import random
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Many
from contextlib import aclosing
from copy import copy
from dataclasses import dataclass, replace

from services.core.clock import Clock
from services.core.errors import (
    DeadlineExceeded,
    DiptychError,
    Draining,
    NoWorker,
    Overloaded,
    RoleChanged,
    WorkerLost,
    facts,
)
from services.gateway.choices import Choices
from services.gateway.cluster_view import ClusterView
from services.gateway.generation import AttemptFailed, Event, Excluded, Generation, Routed
from services.gateway.merge import merged
from services.gateway.pipeline import Pipeline
from services.gateway.waiting_line import WaitingLine
from services.gateway.worker_client import OutputToken, Sequence

logger = logging.getLogger(__name__)

# A failed worker, or a pair that did not find each other, is avoided for this long by the request it
# failed; then it has recovered, or has lost its lease if it is dead. A cluster that has no other worker
# must be able to use it again.
EXCLUSION_S = 3.0
# One that sends work away because it drains or has another role says so in its report by then.
SENT_AWAY_S = 0.5
PAUSE_MIN_S, PAUSE_MAX_S = 0.02, 0.2  # between two looks for capacity


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    attempts_max: int = 4  # that fail without a token between them; a long stream may survive more faults
    attempts_total_max: int = 16  # that fail at all, so that no request goes round for ever
    admission_timeout_s: float = 120.0  # how long to wait for room without any progress
    no_worker_timeout_s: float = 15.0  # the same while no worker is there at all


class Patience:
    """Whether and when one request, or one choice of it, may try again, and which workers it avoids."""

    def __init__(
        self, policy: RetryPolicy, line: WaitingLine, deadline: float, clock: Clock, rng: random.Random
    ) -> None:
        self._policy, self._line, self._deadline = policy, line, deadline
        self._clock, self._rng = clock, rng
        self._failures = 0  # since the last token
        self._failures_total = 0
        self._waiting_since: float | None = None
        self._workerless_since: float | None = None
        self._excluded_until: dict[Excluded, float] = {}

    @property
    def excluded(self) -> set[Excluded]:
        now = self._clock.now()
        return {avoided for avoided, end in self._excluded_until.items() if end > now}

    async def turn(self) -> None:
        """Wait while an older request must go first. Raises Overloaded if that takes too long."""
        while self._line.holds_back(self):
            self._wait_for_capacity(Overloaded("Older requests wait for room. Try again in a moment."))
            await self._line.until_moved(PAUSE_MAX_S)
            self._check_deadline()

    def note(self, event: Event) -> None:
        """Any word from a worker means that it has room: the next in the line may go. Only a token is
        progress, after which the counts of failures and of waiting for capacity start anew."""
        self._workerless_since = None  # even a route is one to a worker that is there
        if not isinstance(event, Routed):
            self._line.leave(self)
        if isinstance(event, OutputToken):
            self._waiting_since = None
            self._failures = 0

    def end(self) -> None:
        """The request is over."""
        self._line.leave(self)

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
            self._wait_for_capacity(failed.error)
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

    async def pause(self, failed: AttemptFailed) -> None:
        """Wait before looking for capacity again; after other failures there is nothing to wait for."""
        if lacks_capacity(failed.error):
            await self._pause()
        self._check_deadline()

    def _wait_for_capacity(self, reason: DiptychError) -> None:
        """Raises `reason` when the request has waited without progress for as long as it may."""
        now = self._clock.now()
        if self._waiting_since is None:
            self._waiting_since = now
        if not isinstance(reason, NoWorker):
            self._workerless_since = None
        elif self._workerless_since is None:
            self._workerless_since = now
        if self.excluded:
            self._line.leave(self)  # others must not wait for what this one does not want
        else:
            self._line.join(self, self._waiting_since)
        if now - self._waiting_since >= self._policy.admission_timeout_s:
            raise reason
        if (
            self._workerless_since is not None
            and now - self._workerless_since >= self._policy.no_worker_timeout_s
        ):
            raise reason

    async def _pause(self) -> None:
        await self._clock.sleep(self._rng.uniform(PAUSE_MIN_S, PAUSE_MAX_S))
        self._check_deadline()

    def _check_deadline(self) -> None:
        if self._clock.now() >= self._deadline:
            raise DeadlineExceeded("The request waited for a worker until its time was over.")


def lacks_capacity(error: DiptychError) -> bool:
    return isinstance(error, Overloaded | NoWorker)


def is_sent_away(error: DiptychError) -> bool:
    """Nothing has failed: the worker wants the work to be done elsewhere."""
    return isinstance(error, Draining | RoleChanged)


class Attempts:
    """All attempts at one request. `choices` keeps what they deliver."""

    def __init__(
        self, generation: Generation, choices: Choices, pipeline: Pipeline, view: ClusterView
    ) -> None:
        self._generation, self._choices = generation, choices
        self._pipeline, self._view = pipeline, view
        self._numbers = itertools.count(1)

    def events(self, patience: Patience) -> AsyncGenerator[Event, None]:
        """The events of as many attempts as it takes; each failed one that is followed by another ends
        with AttemptFailed. Raises the error of the last one.
        """
        return self._events(range(len(self._choices)), patience)

    async def _events(self, served: Many[int], patience: Patience) -> AsyncGenerator[Event, None]:
        try:
            while len(groups := self._choices.alike(served)) == 1:
                if not self._choices.begun:  # an answer that has begun goes on first
                    await patience.turn()
                failed: AttemptFailed | None = None
                sequence = self._next_sequence(groups[0])
                async with aclosing(self._attempt(sequence, patience)) as events:
                    async for event in events:
                        if isinstance(event, AttemptFailed):
                            failed = event
                            break
                        patience.note(event)
                        yield event
                if failed is None:
                    return
                _note(sequence, failed, self._view)
                patience.admit_failure(failed)
                yield replace(failed, others_go_on=len(served) < len(self._choices))
                await patience.pause(failed)
        finally:
            patience.end()
        async with aclosing(merged(self._events(group, patience.fork()) for group in groups)) as together:
            async for event in together:
                yield event

    def _next_sequence(self, choices: tuple[int, ...]) -> Sequence:
        return self._generation.sequence(next(self._numbers), choices, self._choices.delivered[choices[0]])

    def _attempt(self, sequence: Sequence, patience: Patience) -> AsyncGenerator[Event, None]:
        return self._pipeline.attempt(sequence, self._choices, patience.excluded, self._generation.deadline)


def _note(sequence: Sequence, failed: AttemptFailed, view: ClusterView) -> None:
    worker_id = failed.culprit.worker_id if failed.culprit else None
    if isinstance(failed.error, WorkerLost) and failed.culprit is not None:
        view.suspect(failed.culprit.key)
    expected = lacks_capacity(failed.error) or is_sent_away(failed.error)
    level = logging.DEBUG if expected else logging.WARNING
    context = {"request_id": sequence.request_id, "worker_id": worker_id}
    logger.log(level, "attempt %d failed: %s", sequence.attempt, failed.error.message, extra=context)
