"""Tells membership about this worker: at once when something changed, and at least every 250 ms.

Its load changes with every step. What is more than 100 ms old is told at once, else when it is so old:
gateways look no more often, and each report costs the cores of this machine a millisecond.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import msgspec

from services.core.clock import Clock
from services.core.errors import StoreUnavailable
from services.core.worker_report import WorkerReport
from services.membership.protocol import Membership

PERIOD_S = 0.25
_LOAD_PERIOD_S = 0.1
_PERIOD_MIN_S = 0.02  # whatever changes

logger = logging.getLogger(__name__)


class Announcer:
    def __init__(self, membership: Membership, report: Callable[[], WorkerReport], clock: Clock) -> None:
        self._membership = membership
        self._report = report
        self._clock = clock
        self._changed = asyncio.Event()
        self._load_changed = asyncio.Event()
        self._away = False
        self._beat = 0

    def changed(self) -> None:
        """What it is or does."""
        self._changed.set()
        self._load_changed.set()

    def load_changed(self) -> None:
        self._load_changed.set()

    async def run(self) -> None:
        """Announce until cancelled."""
        while True:
            self._changed.clear()
            self._load_changed.clear()
            await self._announce()
            await self._clock.sleep(_PERIOD_MIN_S)
            await _within(_LOAD_PERIOD_S - _PERIOD_MIN_S, self._changed)
            await _within(PERIOD_S - _LOAD_PERIOD_S, self._load_changed)

    async def _announce(self) -> None:
        try:
            self._beat += 1
            await self._membership.announce(msgspec.structs.replace(self._report(), beat=self._beat))
        except StoreUnavailable as error:
            if not self._away:
                logger.warning("membership is away, announcing again when it is back: %s", error)
            self._away = True
        else:
            if self._away:
                logger.info("membership is back")
            self._away = False

    async def leave(self) -> None:
        """After `run`: nobody shall wait for the lease to expire."""
        try:
            await self._membership.leave(self._report().key)
        except StoreUnavailable:
            logger.warning("membership is away: this worker's lease will expire by itself")


async def _within(seconds: float, event: asyncio.Event) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
