"""The in-memory twin of the Redis index, for tests and the simulator: same answers, injected time.

One object stands for the shared store; workers and gateways of a simulated cluster all hold it.
`available` and `lose_everything` are its faults.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.core.clock import Clock
from services.core.errors import StoreUnavailable
from services.core.worker_report import WorkerKey
from services.index.publication import Publications


@dataclass(slots=True)
class _Entry:
    vouched: bool = False  # begun by a publish that replaced it, so it is complete
    hashes: set[bytes] = field(default_factory=set)
    expires_at: float = 0.0  # seconds, on the clock


class MemoryPrefixIndex:
    def __init__(self, clock: Clock, *, ttl_s: float = 30.0) -> None:
        self.available = True  # False: every call raises StoreUnavailable
        self._clock = clock
        self._ttl_s = ttl_s
        self._entries: dict[WorkerKey, _Entry] = {}
        self._publications = Publications()

    async def publish(self, worker: WorkerKey, stored: Sequence[bytes], evicted: Sequence[bytes]) -> None:
        with self._publications.publishing(worker) as replaces:
            entry = self._live_entry(worker)
            if replaces or entry is None:
                entry = self._entries[worker] = _Entry(vouched=replaces)
            entry.hashes.update(stored)
            entry.hashes.difference_update(evicted)
            entry.expires_at = self._clock.now() + self._ttl_s

    async def renew(self, worker: WorkerKey) -> bool:
        entry = self._live_entry(worker)
        if entry is not None:
            entry.expires_at = self._clock.now() + self._ttl_s
        return self._publications.renewed(worker, alive=entry is not None and entry.vouched)

    async def locate(self, hashes: Sequence[bytes], workers: Sequence[WorkerKey]) -> dict[WorkerKey, int]:
        return {worker: self._leading(hashes, worker) for worker in workers}

    async def forget(self, worker: WorkerKey) -> None:
        self._publications.forget(worker)
        if self._live_entry(worker) is not None:
            del self._entries[worker]

    async def close(self) -> None:
        pass

    def lose_everything(self) -> None:
        """What a restart of Redis does."""
        self._entries.clear()

    def _leading(self, hashes: Sequence[bytes], worker: WorkerKey) -> int:
        entry = self._live_entry(worker)
        if entry is None:
            return 0
        return bisect_left(range(len(hashes)), True, key=lambda i: hashes[i] not in entry.hashes)

    def _live_entry(self, worker: WorkerKey) -> _Entry | None:
        if not self.available:
            raise StoreUnavailable("the in-memory index is switched off")
        entry = self._entries.get(worker)
        if entry is not None and entry.expires_at <= self._clock.now():
            del self._entries[worker]
            return None
        return entry
