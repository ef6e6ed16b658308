"""Who has been let in of late, and who refused: fairness at the door of a queue that deadlines keep short.

The queue is fair between those who are in it. But where only a few may wait, it matters who gets in, and by
chance that is whoever comes most often. So of a class's tenants that were refused of late, one that got
more in than the average must find a shorter queue: by the square of what it got more, as the others find the
room that it leaves by chance, too. Nobody who has not been refused counts, so capacity that the others do
not want is not kept for them.
"""

from dataclasses import dataclass
from statistics import fmean

from services.core.clock import Clock
from services.gateway.admission.fair_queue import Priority

REMEMBERED_S = 10.0  # several waits; a token of that age counts half
TENANTS_KEPT = 4096
_FORGOTTEN = 1.0  # tokens


@dataclass(slots=True)
class _Recent:
    """Tokens, as of `at`."""

    at: float
    let_in: float = 0.0
    refused: float = 0.0


class DoorShares:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._recent: dict[tuple[Priority, str], _Recent] = {}  # the least recently seen first

    def note(self, priority: Priority, tenant: str, tokens: int, *, let_in: bool) -> None:
        """A request of so many tokens was let in or refused."""
        recent = self._faded(priority, tenant)
        recent.let_in += tokens if let_in else 0
        recent.refused += 0 if let_in else tokens
        self._recent.pop((priority, tenant), None)
        self._recent[priority, tenant] = recent
        if len(self._recent) > TENANTS_KEPT:
            del self._recent[next(iter(self._recent))]

    def share(self, priority: Priority, tenant: str) -> float:
        """Of the time it may wait, how much the tenant may use: 1, or less if it got more in than others."""
        mine = self._faded(priority, tenant).let_in
        wanting = [self._faded(*key) for key in self._recent if key[0] is priority]
        wanting = [one for one in wanting if one.refused > _FORGOTTEN]
        if not wanting or mine <= _FORGOTTEN:
            return 1.0
        return min(1.0, (fmean(one.let_in for one in wanting) / mine) ** 2)

    def _faded(self, priority: Priority, tenant: str) -> _Recent:
        now = self._clock.now()
        recent = self._recent.get((priority, tenant))
        if recent is None:
            return _Recent(now)
        kept = 0.5 ** ((now - recent.at) / REMEMBERED_S)
        return _Recent(now, recent.let_in * kept, recent.refused * kept)
