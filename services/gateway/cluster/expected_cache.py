"""What this gateway's own requests have put into workers' caches, or are about to.

The index shows a block once it is computed and published. Until then requests with one prefix that arrive
together would be spread as if nobody had it, and each would compute it. So an attempt notes what its
workers will hold:

    note ── P, or D alone ──> COMING ── first token ──┐
         └─ D of a pair ─────────────── Started ──────┴─> THERE ── PUBLISHED_S later ──> kept

COMING counts for the worker itself: its queue is first come first served, so whoever is sent there now finds
the blocks. It cannot lend them yet. THERE counts as cached. An attempt that ends before a part is
THERE takes that part back.

What is THERE is kept as blocks by hash with the workers that got them, the least recently used first to go,
also beyond PUBLISHED_S: it serves while Redis is away, and until the workers have published again. A chain's
last blocks are older than its first, so what remains of it is a prefix. Nothing outlives a worker's
incarnation: it is asked for by WorkerKey.
"""

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from services.core.block_hash import shared_blocks
from services.core.clock import Clock
from services.core.worker_report import WorkerKey
from services.gateway.path.generation import Event
from services.gateway.workers.worker_client import OutputToken, PrefillResult, Started

# From a block's end of computation to its entry in the index: the worker's report, its batch of 20 ms,
# a round trip; and a step that holds up the report.
PUBLISHED_S = 1.0
# A million tokens with blocks of 16: 13 MB where each was on two workers.
BLOCKS_KEPT = 65_536
# Of one block, of which the index knows: more do not make a route better, and names of workers that are gone
# must not pile up.
HOLDERS_KEPT = 8

Chain = Sequence[bytes]


class Stage(Enum):
    NOTHING = "nothing"  # yet: the KV is on its way to a decode worker
    COMING = "coming"
    THERE = "there"


class Leading(NamedTuple):
    """How many leading blocks of a chain a worker holds, and will hold when what was sent there is done."""

    there: int
    coming: int


@dataclass(slots=True, eq=False)
class _Part:
    worker: WorkerKey
    chain: Chain
    stage: Stage

    @property
    def first(self) -> bytes:
        return self.chain[0]


class _Holder(NamedTuple):
    """Of a block; one object for all blocks of a part."""

    worker: WorkerKey
    until: float  # then the index knows


class ExpectedCache:
    def __init__(self, clock: Clock, blocks_kept: int = BLOCKS_KEPT) -> None:
        self._clock = clock
        self._blocks_kept = blocks_kept
        # What is not THERE, by a chain's first block, which only those have that share anything with it. As
        # many parts as running attempts have, two each at most.
        self._parts: dict[bytes, list[_Part]] = {}
        self._kept: OrderedDict[bytes, tuple[_Holder, ...]] = OrderedDict()

    @contextmanager
    def noted(
        self, prefill: tuple[WorkerKey, Chain] | None, decode: tuple[WorkerKey, Chain] | None
    ) -> Iterator["Noted"]:
        """Around an attempt: who computes the chain (a prefill worker, else the decode worker), and who
        else gets it. The caller passes on the attempt's events."""
        computes = _part(prefill or decode, Stage.COMING)
        receives = _part(decode, Stage.NOTHING) if prefill else None
        for part in filter(None, (computes, receives)):
            self._parts.setdefault(part.first, []).append(part)
        try:
            yield Noted(self, computes, receives)
        finally:
            for part in filter(None, (computes, receives)):
                if part.stage is not Stage.THERE:
                    self._remove(part)

    def arrived(self, part: _Part) -> None:
        """The worker has it all."""
        if part.stage is Stage.THERE:
            return
        part.stage = Stage.THERE
        self._remove(part)
        self._keep(part)

    def expected(self, chain: Chain, workers: Iterable[WorkerKey]) -> dict[WorkerKey, Leading]:
        """What the index cannot know yet. Workers of which nothing is expected are left out."""
        if not chain:
            return {}
        now, asked = self._clock.now(), set(workers)
        fresh = {holder.worker for holder in self._kept.get(chain[0], ()) if holder.until > now}
        there = {worker: self._leading(chain, worker, now) for worker in fresh & asked}
        coming: dict[WorkerKey, int] = {}
        for part in self._parts.get(chain[0], ()):
            if part.worker in asked and part.stage is Stage.COMING:
                known = coming.get(part.worker, 0)
                if known < min(len(chain), len(part.chain)) and chain[known] == part.chain[known]:
                    coming[part.worker] = shared_blocks(chain, part.chain)
        return {
            worker: Leading(there.get(worker, 0), max(there.get(worker, 0), coming.get(worker, 0)))
            for worker in {**there, **coming}
        }

    def kept(self, chain: Chain, workers: Iterable[WorkerKey]) -> dict[WorkerKey, int]:
        """Leading blocks of `chain` that each worker once got, and may have evicted since."""
        return {worker: self._leading(chain, worker) for worker in workers}

    def _leading(self, chain: Chain, worker: WorkerKey, after: float = -math.inf) -> int:
        """How many leading blocks of `chain` it got, of which the index knows only after that time."""

        def lacks(block: int) -> bool:
            holders = self._kept.get(chain[block], ())
            return not any(holder.worker == worker and holder.until > after for holder in holders)

        return bisect_left(range(len(chain)), True, key=lacks)

    def _keep(self, part: _Part) -> None:
        now = self._clock.now()
        new = _Holder(part.worker, now + PUBLISHED_S)
        for block in reversed(part.chain):
            holders = self._kept.get(block, ())
            others = [one for one in holders if one.worker.worker_id != part.worker.worker_id]
            excess = len(others) + 1 - HOLDERS_KEPT
            if excess > 0:
                others = [one for n, one in enumerate(others) if n >= excess or one.until > now]
            self._kept[block] = (*others, new)
            self._kept.move_to_end(block)
        while len(self._kept) > self._blocks_kept:
            self._kept.popitem(last=False)

    def _remove(self, part: _Part) -> None:
        alike = self._parts[part.first]
        alike.remove(part)
        if not alike:
            del self._parts[part.first]


class Noted:
    """One attempt's parts."""

    def __init__(self, cache: ExpectedCache, computes: _Part | None, receives: _Part | None) -> None:
        self._cache, self._computes, self._receives = cache, computes, receives

    def see(self, event: Event) -> None:
        match event:
            case PrefillResult() | OutputToken() if self._computes:
                self._cache.arrived(self._computes)
            case Started() if self._receives:
                self._cache.arrived(self._receives)
            case _:
                pass


def _part(holder: tuple[WorkerKey, Chain] | None, stage: Stage) -> _Part | None:
    return _Part(*holder, stage) if holder and holder[1] else None
