"""What a publisher must remember to tell a complete index entry from one that lost its past.

An entry grows by increments. If Redis loses it (a restart) or an increment is lost (a failed call),
later increments would build an entry that looks alive but lacks blocks, or keeps evicted ones. So
only a publish that starts an entry anew may vouch for it, and a failure ends the vouching:

    FRESH     -- publish succeeded, replacing the entry --> COMPLETE
    FRESH     -- publish failed -------------------------> BROKEN
    COMPLETE  -- publish failed -------------------------> BROKEN
    any       -- renew returned False -------------------> FRESH   (the caller publishes all next)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from services.core.worker_report import WorkerKey


class Publication(Enum):
    FRESH = "fresh"  # the next publish carries all that the worker holds
    COMPLETE = "complete"  # the entry holds all that was published
    BROKEN = "broken"  # it may not: the next renew must say so


class Publications:
    """The state of each worker that publishes through this process."""

    def __init__(self) -> None:
        self._states: dict[WorkerKey, Publication] = {}

    def state(self, worker: WorkerKey) -> Publication:
        return self._states.get(worker, Publication.FRESH)

    @contextmanager
    def publishing(self, worker: WorkerKey) -> Iterator[bool]:
        """Around one publish; gives whether it must replace the entry."""
        state = self.state(worker)
        # Set before, so that a publish that fails or is cancelled half way leaves it broken.
        self._states[worker] = Publication.BROKEN
        yield state is Publication.FRESH
        if state is not Publication.BROKEN:
            self._states[worker] = Publication.COMPLETE

    def renewed(self, worker: WorkerKey, alive: bool) -> bool:
        """What renew answers, given whether the store still has the entry."""
        complete = alive and self.state(worker) is Publication.COMPLETE
        if not complete:
            self._states[worker] = Publication.FRESH
        return complete

    def forget(self, worker: WorkerKey) -> None:
        self._states.pop(worker, None)
