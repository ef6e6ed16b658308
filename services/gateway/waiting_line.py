"""Fairness between requests that wait for capacity.

Waiting requests look for room at random moments, so a large one would starve: small ones keep taking
what is freed. Once the oldest has waited for long, younger ones and new ones hold back until a worker
has room for it; then it leaves the line and the next one is the oldest.
"""

import asyncio

from services.core.child_tasks import ChildTasks
from services.core.clock import Clock

# Until then anybody may go first, which keeps the workers busy.
HOLD_BACK_AFTER_S = 2.0


class WaitingLine:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._moved = asyncio.Event()
        self._since: dict[object, float] = {}  # by request, oldest first

    def __len__(self) -> int:
        return len(self._since)

    def join(self, request: object, since: float) -> None:
        """The request has looked for room in vain since then. One that comes back finds its old place."""
        if request not in self._since:
            self._since[request] = since
            self._since = dict(sorted(self._since.items(), key=lambda item: item[1]))

    def leave(self, request: object) -> None:
        if self._since.pop(request, None) is not None:
            self._moved.set()
            self._moved = asyncio.Event()

    async def until_moved(self, at_most_s: float) -> None:
        """Wait until somebody leaves the line."""
        async with ChildTasks() as tasks:
            waits = [tasks.start(self._moved.wait()), tasks.start(self._clock.sleep(at_most_s))]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)

    def holds_back(self, request: object) -> bool:
        """Whether `request`, in the line or not, must let the oldest go first."""
        oldest = next(iter(self._since), None)
        if oldest is None or oldest is request:
            return False
        return self._clock.now() - self._since[oldest] >= HOLD_BACK_AFTER_S
