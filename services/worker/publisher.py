"""Keeps the global prefix index in step with this worker's cache, off the engine's path.

Changes are collected and sent in batches. When Redis was away, the entry is gone, or the worker has
become another incarnation, all that the index should show is published again, in batches too: between
two of them the worker's other work, and Redis' other clients, have their turn.

A Redis without memory for more gets less: each refusal halves what this worker shows, so that what other
clients need is free again in seconds, and a minute without a refusal doubles it.
"""

import asyncio
import logging
from collections.abc import Iterable

from services.core.block_hash import ChainLink
from services.core.clock import Clock
from services.core.errors import StoreFull, StoreUnavailable
from services.engine.incarnation import Incarnation
from services.index.protocol import PrefixIndex
from services.worker.indexed_chains import IndexedChains

_BATCH_S = 0.05  # changes are collected for so long: at most 20 round trips a second
BATCH_BLOCKS_MAX = 1_000  # Redis is busy with so many for half a millisecond
_RENEW_S = 5.0
_RETRY_S = 0.5
_REGROW_S = 60.0

logger = logging.getLogger(__name__)


class IndexPublisher:
    """`blocks_max`: how many blocks of this worker the index shows at most."""

    def __init__(self, index: PrefixIndex, incarnation: Incarnation, clock: Clock, blocks_max: int) -> None:
        self._index = index
        self._incarnation = incarnation
        self._worker = incarnation.key  # whom the entry belongs to
        self._clock = clock
        self._blocks_max = blocks_max
        self._chains = IndexedChains(blocks_max)
        self._changed = asyncio.Event()
        self._complete = False  # the entry holds all that was taken from the chains
        self._away = False
        self._full_at_s = clock.now()  # when Redis last had no memory for more, or we asked for more

    def record(self, stored: Iterable[ChainLink], evicted: Iterable[bytes]) -> None:
        """Note what one report changed. Within a report no block is in both."""
        self._chains.record(stored, evicted)
        if self._chains.changed:
            self._changed.set()

    def begin_anew(self) -> None:
        """The worker is another incarnation now."""
        self._changed.set()

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            try:
                await self._turn()
                if not self._complete:
                    await self._clock.sleep(_RETRY_S)  # a Redis that drops what it gets is not kept busy
            except StoreUnavailable as error:
                self._complete = False
                self._give_way(error)
                await self._clock.sleep(_RETRY_S)

    def _give_way(self, error: StoreUnavailable) -> None:
        if not self._away:
            logger.warning("the prefix index is away, publishing again when it is back: %s", error)
        self._away = True
        if isinstance(error, StoreFull):
            self._chains.limit = len(self._chains) // 2
            self._full_at_s = self._clock.now()

    async def _turn(self) -> None:
        """Renew the entry, or publish all if it is not there or not complete; then the changes, until the
        next renewal is due, the entry is gone, or the worker is another incarnation."""
        await self._follow_incarnation()
        if not (self._complete and await self._index.renew(self._worker)):
            await self._publish_all()
        self._regrow()
        renew_at_s = self._clock.now() + _RENEW_S
        while self._clock.now() < renew_at_s and self._worker == self._incarnation.key and self._complete:
            if await self._wait_for_change(renew_at_s - self._clock.now()):
                await self._clock.sleep(_BATCH_S)
                await self._publish_changes()

    async def _follow_incarnation(self) -> None:
        if self._worker != self._incarnation.key:
            # Nobody asks for the old entry any more; should this fail, it is swept.
            before, self._worker = self._worker, self._incarnation.key
            self._complete = False
            await self._index.forget(before)

    async def _publish_all(self) -> None:
        await self._index.begin(self._worker)
        if self._chains.limit < self._blocks_max:
            await self._clock.sleep(_RETRY_S)  # Redis frees what the old entry took in the background
        self._complete = True
        self._chains.forget_changes()
        await self._publish_changes()
        if self._away and self._complete:
            logger.info("the prefix index is back; %d blocks published again", len(self._chains))
            self._away = False

    async def _publish_changes(self) -> None:
        self._changed.clear()
        while self._complete and self._chains.changed:
            stored, evicted = self._chains.take_changes(BATCH_BLOCKS_MAX)
            self._complete = await self._index.publish(self._worker, stored, evicted)

    def _regrow(self) -> None:
        if self._chains.limit < self._blocks_max and self._clock.now() - self._full_at_s > _REGROW_S:
            self._chains.limit = min(self._blocks_max, max(1, 2 * self._chains.limit))
            self._full_at_s = self._clock.now()

    async def _wait_for_change(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def forget(self) -> None:
        """After `run`: take this worker's entry back."""
        try:
            await self._index.forget(self._worker)
        except StoreUnavailable:
            logger.warning("the prefix index is away: this worker's entry will be swept")
