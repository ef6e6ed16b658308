"""Fairness between requests that wait for capacity.

Waiting requests look for room at random moments, so a large one would starve: small ones keep taking
what is freed. Once the oldest has waited for long, younger ones and new ones hold back until it is
served; what ends meanwhile becomes its room.
"""

from services.core.clock import Clock

# Until then anybody may go first, which keeps the workers busy.
HOLD_BACK_AFTER_S = 2.0


class WaitingLine:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since: dict[object, float] = {}  # by request, oldest first

    def __len__(self) -> int:
        return len(self._since)

    def join(self, request: object) -> None:
        """The request found no room. Keeps the place of one that is in the line already."""
        self._since.setdefault(request, self._clock.now())

    def leave(self, request: object) -> None:
        self._since.pop(request, None)

    def holds_back(self, request: object) -> bool:
        """Whether `request`, in the line or not, must let the oldest go first."""
        oldest = next(iter(self._since), None)
        if oldest is None or oldest is request:
            return False
        return self._clock.now() - self._since[oldest] >= HOLD_BACK_AFTER_S
