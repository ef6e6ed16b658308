"""The in-memory twin of the Redis history: same answers, injected time. `available` is its fault."""

from collections import OrderedDict, defaultdict
from typing import NamedTuple

from services.core.clock import Clock
from services.core.errors import StoreUnavailable
from services.history.protocol import KEPT_MAX


class _Kept(NamedTuple):
    answer: bytes
    until: float  # on the clock


class MemoryHistory:
    def __init__(self, clock: Clock, *, ttl_s: float, kept_max: int = KEPT_MAX) -> None:
        self.available = True  # False: every call raises StoreUnavailable
        self._clock, self._ttl_s, self._kept_max = clock, ttl_s, kept_max
        self._of_owner: defaultdict[str, OrderedDict[str, _Kept]] = defaultdict(OrderedDict)

    async def put(self, owner: str, response_id: str, answer: bytes) -> None:
        self._require_available()
        kept = self._of_owner[owner]
        kept.pop(response_id, None)
        kept[response_id] = _Kept(answer, self._clock.now() + self._ttl_s)
        while len(kept) > self._kept_max:
            kept.popitem(last=False)

    async def get(self, owner: str, response_id: str) -> bytes | None:
        self._require_available()
        kept = self._of_owner[owner].get(response_id)
        return kept.answer if kept is not None and kept.until > self._clock.now() else None

    async def delete(self, owner: str, response_id: str) -> bool:
        there = await self.get(owner, response_id) is not None
        self._of_owner[owner].pop(response_id, None)
        return there

    async def close(self) -> None:
        pass

    def _require_available(self) -> None:
        if not self.available:
            raise StoreUnavailable("the in-memory history is switched off")
