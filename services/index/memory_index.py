"""The in-memory twin of the Redis index, for tests and the simulator: same answers, injected time.

One object stands for the shared store; workers and gateways of a simulated cluster all hold it.
`available`, `blocks_max` and `lose_everything` are its faults.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.core.clock import Clock
from services.core.errors import StoreFull, StoreUnavailable
from services.core.worker_report import WorkerKey
from services.index.protocol import DEAD_AFTER_S, TTL_S


@dataclass(slots=True)
class _Entry:
    renewed_at: float  # seconds, on the clock
    hashes: set[bytes] = field(default_factory=set)


class MemoryPrefixIndex:
    def __init__(self, clock: Clock, *, ttl_s: float = TTL_S) -> None:
        self.available = True  # False: every call raises StoreUnavailable
        self.blocks_max: int | None = None  # that there is memory for
        self._clock = clock
        self._ttl_s = ttl_s
        self._entries: dict[WorkerKey, _Entry] = {}

    async def begin(self, worker: WorkerKey) -> None:
        self._require_available()
        self._entries[worker] = _Entry(self._clock.now())

    async def publish(self, worker: WorkerKey, stored: Sequence[bytes], evicted: Sequence[bytes]) -> bool:
        entry = self._live_entry(worker)
        if entry is None:
            return False
        if stored and self.blocks_max is not None and self.blocks > self.blocks_max:
            raise StoreFull("the in-memory index has no room for more blocks")
        entry.hashes.update(stored)
        entry.hashes.difference_update(evicted)
        return True

    async def renew(self, worker: WorkerKey) -> bool:
        entry = self._live_entry(worker)
        if entry is not None:
            entry.renewed_at = self._clock.now()
        self._sweep()
        return entry is not None

    async def locate(self, hashes: Sequence[bytes], workers: Sequence[WorkerKey]) -> dict[WorkerKey, int]:
        return {worker: self._leading(hashes, worker) for worker in workers}

    async def forget(self, worker: WorkerKey) -> None:
        self._require_available()
        self._entries.pop(worker, None)

    async def close(self) -> None:
        pass

    def lose_everything(self) -> None:
        """What a restart of Redis does."""
        self._entries.clear()

    @property
    def blocks(self) -> int:
        return sum(len(entry.hashes) for entry in self._entries.values())

    def _leading(self, hashes: Sequence[bytes], worker: WorkerKey) -> int:
        entry = self._live_entry(worker)
        if entry is None:
            return 0
        return bisect_left(range(len(hashes)), True, key=lambda i: hashes[i] not in entry.hashes)

    def _live_entry(self, worker: WorkerKey) -> _Entry | None:
        self._require_available()
        entry = self._entries.get(worker)
        if entry is not None and entry.renewed_at <= self._clock.now() - self._ttl_s:
            del self._entries[worker]
            return None
        return entry

    def _sweep(self) -> None:
        oldest = self._clock.now() - self._ttl_s * DEAD_AFTER_S / TTL_S
        self._entries = {worker: e for worker, e in self._entries.items() if e.renewed_at > oldest}

    def _require_available(self) -> None:
        if not self.available:
            raise StoreUnavailable("the in-memory index is switched off")
