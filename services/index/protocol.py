"""The global prefix index: which worker holds which block. A hint: a stale entry costs time, never
correctness. An entry belongs to one incarnation of a worker (its epoch); entries of other epochs are
invisible, because callers ask by WorkerKey.

An entry grows by increments. Where it is lost (a restart of the store), or an increment may be (a call
that failed), later increments would build one that looks alive but lacks blocks or keeps evicted ones.
So publish adds to nothing that begin has not begun, and whoever publishes begins again after a failure:

    begin ── publish* ── renew (True) ── publish* ── renew (False) ── begin ── publish everything ── ...

Every method but close may raise StoreUnavailable, and publish StoreFull, if the store has no memory for
more blocks. One task per worker calls begin, publish and renew.
"""

from collections.abc import Sequence
from typing import Protocol

from services.core.worker_report import WorkerKey

# An entry that was not renewed for so long belongs to a dead incarnation, and may be swept. Six periods of
# renewal: a worker that was cut off for less comes back to what it had published.
DEAD_AFTER_S = 30.0
# By then it is gone, even if nobody is left who sweeps: a live worker sweeps one of 8 shards every 5 s.
TTL_S = 4 * DEAD_AFTER_S


class PrefixIndex(Protocol):
    async def begin(self, worker: WorkerKey) -> None:
        """Start the worker's entry, empty, in place of the one that it may have had."""
        ...

    async def publish(self, worker: WorkerKey, stored: Sequence[bytes], evicted: Sequence[bytes]) -> bool:
        """Record blocks that `worker` now holds, then those it no longer holds. Idempotent. A batch is
        seen whole or not at all if it is no longer than BATCH_BLOCKS_MAX.

        False: its entry is gone, nothing was recorded.
        """
        ...

    async def renew(self, worker: WorkerKey) -> bool:
        """Keep the worker's entry alive for another TTL, and sweep some that are dead. False: it is gone."""
        ...

    async def locate(self, hashes: Sequence[bytes], workers: Sequence[WorkerKey]) -> dict[WorkerKey, int]:
        """For each worker how many leading blocks of the chain `hashes` it holds. One round trip.

        What a worker publishes is closed under prefixes: a block proves that the ones before are there.
        """
        ...

    async def forget(self, worker: WorkerKey) -> None:
        """Remove this incarnation's entry."""
        ...

    async def close(self) -> None: ...
