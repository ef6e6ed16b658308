"""What this gateway's own requests have put into workers' caches, or are about to.

The index shows a block once it is computed and published. Until then requests with one prefix that arrive
together would be spread as if nobody had it, and each would compute it. So an attempt notes what its
workers will hold:

    note ── P, or D alone ──> COMING ── first token ──┐
         └─ D of a pair ─────────────── Started ──────┴─> THERE ── PUBLISHED_S later ──> kept

COMING counts for the worker itself: its queue is first come first served, so whoever is sent there now finds
the blocks. It cannot lend them yet. THERE counts as cached. An attempt that ends before a part is
THERE takes that part back.

What is kept serves while Redis is away, and until the workers have published again: blocks by hash with the
workers that got them, the least recently used first to go. A chain's last blocks are older than its first,
so what remains of it is a prefix. Neither kind outlives a worker's incarnation: it is asked for by WorkerKey.
"""

from bisect import bisect_left
from collections import OrderedDict, deque
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
# Of one block: more do not make a route better, and names of workers that are gone must not pile up.
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
    until: float = float("inf")  # when the index knows

    @property
    def first(self) -> bytes:
        return self.chain[0]


class ExpectedCache:
    def __init__(self, clock: Clock, blocks_kept: int = BLOCKS_KEPT) -> None:
        self._clock = clock
        self._blocks_kept = blocks_kept
        # By a chain's first block, which only those have that share anything with it. As many parts as
        # running attempts have, two each, and those that ended within PUBLISHED_S.
        self._parts: dict[bytes, list[_Part]] = {}
        self._published: deque[_Part] = deque()  # THERE, in the order of `until`
        self._kept: OrderedDict[bytes, tuple[WorkerKey, ...]] = OrderedDict()

    @contextmanager
    def noted(
        self, prefill: tuple[WorkerKey, Chain] | None, decode: tuple[WorkerKey, Chain] | None
    ) -> Iterator["Noted"]:
        """Around an attempt: who computes the chain (a prefill worker, else the decode worker), and who
        else gets it. The caller passes on the attempt's events."""
        self._forget_published()
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
        part.stage, part.until = Stage.THERE, self._clock.now() + PUBLISHED_S
        self._published.append(part)
        self._keep(part)

    def expected(self, chain: Chain, workers: Iterable[WorkerKey]) -> dict[WorkerKey, Leading]:
        """What the index cannot know yet. Workers of which nothing is expected are left out."""
        self._forget_published()
        asked = set(workers)
        there: dict[WorkerKey, int] = {}
        coming: dict[WorkerKey, int] = {}
        for part in self._parts.get(chain[0], ()) if chain else ():
            if part.worker in asked and part.stage is not Stage.NOTHING:
                longest = there if part.stage is Stage.THERE else coming
                known = longest.get(part.worker, 0)
                if known < min(len(chain), len(part.chain)) and chain[known] == part.chain[known]:
                    longest[part.worker] = shared_blocks(chain, part.chain)
        return {
            worker: Leading(there.get(worker, 0), max(there.get(worker, 0), coming.get(worker, 0)))
            for worker in {**there, **coming}
        }

    def kept(self, chain: Chain, workers: Iterable[WorkerKey]) -> dict[WorkerKey, int]:
        """Leading blocks of `chain` that each worker once got, and may have evicted since."""
        return {worker: self._leading(chain, worker) for worker in workers}

    def _leading(self, chain: Chain, worker: WorkerKey) -> int:
        return bisect_left(
            range(len(chain)), True, key=lambda block: worker not in self._kept.get(chain[block], ())
        )

    def _keep(self, part: _Part) -> None:
        for block in reversed(part.chain):
            others = [key for key in self._kept.get(block, ()) if key.worker_id != part.worker.worker_id]
            self._kept[block] = (*others[1 - HOLDERS_KEPT :], part.worker)
            self._kept.move_to_end(block)
        while len(self._kept) > self._blocks_kept:
            self._kept.popitem(last=False)

    def _forget_published(self) -> None:
        while self._published and self._published[0].until <= self._clock.now():
            self._remove(self._published.popleft())

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
