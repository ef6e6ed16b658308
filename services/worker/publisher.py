"""Keeps the global prefix index in step with this worker's cache, off the engine's path.

Changes are collected and sent in batches. When Redis was away, the entries are gone, or the worker has
become another incarnation, everything that is resident is published again.
"""

import asyncio
import logging
from collections.abc import Sequence

from services.core.clock import Clock
from services.core.errors import StoreUnavailable
from services.engine.incarnation import Incarnation
from services.index.protocol import PrefixIndex

_BATCH_S = 0.02  # one round trip per batch: at most 50 a second
_RENEW_S = 5.0
_RETRY_S = 0.5

logger = logging.getLogger(__name__)


class IndexPublisher:
    def __init__(self, index: PrefixIndex, incarnation: Incarnation, clock: Clock) -> None:
        self._index = index
        self._incarnation = incarnation
        self._worker = incarnation.key  # whom the entries belong to
        self._clock = clock
        self._resident: set[bytes] = set()
        self._stored: set[bytes] = set()  # not yet published
        self._evicted: set[bytes] = set()
        self._changed = asyncio.Event()
        self._away = False

    def record(self, stored: Sequence[bytes], evicted: Sequence[bytes]) -> None:
        """Note what one report changed. Within a report no hash is in both."""
        for block_hash in stored:
            self._resident.add(block_hash)
            self._evicted.discard(block_hash)
            self._stored.add(block_hash)
        for block_hash in evicted:
            self._resident.discard(block_hash)
            self._stored.discard(block_hash)
            self._evicted.add(block_hash)
        if stored or evicted:
            self._changed.set()

    def begin_anew(self) -> None:
        """The worker is another incarnation now."""
        self._changed.set()

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            try:
                await self._turn()
            except StoreUnavailable as error:
                if not self._away:
                    logger.warning("the prefix index is away, publishing again when it is back: %s", error)
                self._away = True
                await self._clock.sleep(_RETRY_S)

    async def _turn(self) -> None:
        """Renew the entries, or publish them all if they are not there or not complete; then the changes
        until the next renewal is due, or the worker is another incarnation."""
        await self._follow_incarnation()
        if not await self._index.renew(self._worker):
            self._stored, self._evicted = set(self._resident), set()
            await self._publish()
            if self._away:
                logger.info("the prefix index is back; %d blocks published again", len(self._resident))
            self._away = False
        renew_at_s = self._clock.now() + _RENEW_S
        while self._clock.now() < renew_at_s and self._worker == self._incarnation.key:
            if await self._wait_for_change(renew_at_s - self._clock.now()):
                await self._clock.sleep(_BATCH_S)
                await self._publish()

    async def _follow_incarnation(self) -> None:
        if self._worker != self._incarnation.key:
            # Nobody asks for the old entries any more; should this fail, they expire.
            before, self._worker = self._worker, self._incarnation.key
            await self._index.forget(before)

    async def _publish(self) -> None:
        stored, evicted = self._stored, self._evicted
        self._stored, self._evicted = set(), set()
        self._changed.clear()
        await self._index.publish(self._worker, list(stored), list(evicted))

    async def _wait_for_change(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def forget(self) -> None:
        """After `run`: take this worker's entries back."""
        try:
            await self._index.forget(self._worker)
        except StoreUnavailable:
            logger.warning("the prefix index is away: this worker's entries will expire by themselves")
