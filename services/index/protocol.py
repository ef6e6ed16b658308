"""The global prefix index: which worker holds which block. A hint: a stale entry costs time, never
correctness. Entries belong to one incarnation of a worker (its epoch); entries of other epochs are
invisible, because callers ask by WorkerKey.

Every method but close may raise StoreUnavailable. One task per worker calls publish and renew; after
a publish that failed the next renew returns False.
"""

from collections.abc import Sequence
from typing import Protocol

from services.core.worker_report import WorkerKey


class PrefixIndex(Protocol):
    async def publish(self, worker: WorkerKey, stored: Sequence[bytes], evicted: Sequence[bytes]) -> None:
        """Record blocks that `worker` now holds, then those it no longer holds. Idempotent.

        The first publish of a worker, and the first after renew returned False, replaces its entries.
        """
        ...

    async def renew(self, worker: WorkerKey) -> bool:
        """Keep the worker's entries alive for another TTL. False: they are gone, publish all again."""
        ...

    async def locate(self, hashes: Sequence[bytes], workers: Sequence[WorkerKey]) -> dict[WorkerKey, int]:
        """For each worker how many leading blocks of the chain `hashes` it holds. One round trip.

        A worker evicts tails first, so a block that it holds proves that it holds the ones before.
        """
        ...

    async def forget(self, worker: WorkerKey) -> None:
        """Remove all entries of this incarnation."""
        ...

    async def close(self) -> None: ...
