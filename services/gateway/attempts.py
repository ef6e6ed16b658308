"""Retry and resume: an answer that goes on elsewhere when a worker fails.

A new attempt carries the tokens already delivered. With the seed fixed, it goes on with exactly the
tokens that the failed one would have given, so the client sees nothing but a pause.
"""

import itertools
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from services.core.clock import Clock
from services.core.errors import DeadlineExceeded, DiptychError, NoWorker, Overloaded, WorkerLost, facts
from services.core.worker_report import WorkerKey
from services.gateway.cluster_view import ClusterView
from services.gateway.generation import AttemptFailed, Event, Generation, Routed
from services.gateway.pipeline import Pipeline
from services.gateway.waiting_line import WaitingLine
from services.gateway.worker_client import OutputToken

logger = logging.getLogger(__name__)

# A failed worker is avoided for this long by the request it failed; then it has recovered, or has lost
# its lease if it is dead. A cluster that has no other worker must be able to use it again.
EXCLUSION_S = 3.0
PAUSE_MIN_S, PAUSE_MAX_S = 0.02, 0.2  # between two looks for capacity


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    attempts_max: int = 4
    admission_timeout_s: float = 120.0  # how long to wait for room without any progress
    no_worker_timeout_s: float = 15.0  # the same while no worker is there at all


class Patience:
    """Whether and when one request may try again, and which workers it avoids."""

    def __init__(
        self, policy: RetryPolicy, line: WaitingLine, deadline: float, clock: Clock, rng: random.Random
    ) -> None:
        self._policy, self._line, self._deadline = policy, line, deadline
        self._clock, self._rng = clock, rng
        self._failures = 0
        self._waiting_since: float | None = None
        self._workerless_since: float | None = None
        self._excluded_until: dict[WorkerKey, float] = {}

    @property
    def excluded(self) -> set[WorkerKey]:
        now = self._clock.now()
        return {worker for worker, end in self._excluded_until.items() if end > now}

    async def turn(self) -> None:
        """Wait while an older request must go first. Raises Overloaded if that takes too long."""
        while self._line.holds_back(self):
            self._wait_for_capacity(Overloaded("Older requests wait for room. Try again in a moment."))
            await self._line.until_moved(PAUSE_MAX_S)
            self._check_deadline()

    def note(self, event: Event) -> None:
        """Any word from a worker means that it has room: the next in the line may go. Only a token is
        progress, after which waiting for capacity, should it be needed again, starts anew."""
        if not isinstance(event, Routed):
            self._line.leave(self)
            self._workerless_since = None
        if isinstance(event, OutputToken):
            self._waiting_since = None

    def end(self) -> None:
        """The request is over."""
        self._line.leave(self)

    def admit_failure(self, failed: AttemptFailed) -> None:
        """Take note of a failed attempt. Raises its error when no other one may follow."""
        if not facts(failed.error).retryable:
            raise failed.error
        if lacks_capacity(failed.error):
            self._wait_for_capacity(failed.error)
            return
        self._failures += 1
        if self._failures >= self._policy.attempts_max:
            raise failed.error
        if failed.culprit is not None:
            self._excluded_until[failed.culprit.key] = self._clock.now() + EXCLUSION_S

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


async def attempts(
    generation: Generation, pipeline: Pipeline, view: ClusterView, patience: Patience
) -> AsyncGenerator[Event, None]:
    """The events of as many attempts as it takes; each failed one that is followed by another ends
    with AttemptFailed. Raises the error of the last one.
    """
    delivered: list[int] = []
    try:
        for attempt in itertools.count(1):
            if not delivered:  # an answer that has begun goes on first
                await patience.turn()
            failed: AttemptFailed | None = None
            sequence = generation.sequence(attempt, delivered)
            async with aclosing(pipeline.attempt(sequence, patience.excluded, generation.deadline)) as events:
                async for event in events:
                    if isinstance(event, AttemptFailed):
                        failed = event
                        break
                    patience.note(event)
                    if isinstance(event, OutputToken):
                        delivered.append(event.token)
                    yield event
            if failed is None:
                return
            _note(generation, attempt, failed, view)
            patience.admit_failure(failed)
            yield failed
            await patience.pause(failed)
    finally:
        patience.end()


def _note(generation: Generation, attempt: int, failed: AttemptFailed, view: ClusterView) -> None:
    worker_id = failed.culprit.worker_id if failed.culprit else None
    if isinstance(failed.error, WorkerLost) and failed.culprit is not None:
        view.suspect(failed.culprit.key)
    level = logging.DEBUG if lacks_capacity(failed.error) else logging.WARNING
    context = {"request_id": generation.request_id, "worker_id": worker_id}
    logger.log(level, "attempt %d failed: %s", attempt, failed.error.message, extra=context)
