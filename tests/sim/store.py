"""The shared store (Redis) of a simulated cluster: the in-memory twins behind slow connections that break."""

import asyncio
import random
from typing import Any

from services.core.clock import Clock
from services.core.errors import StoreUnavailable
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from tests.sim.loop import Process

_TIMEOUT_S = 1.0  # of the real connection


class SimStore:
    def __init__(self, clock: Clock, rng: random.Random) -> None:
        self.membership = MemoryMembership(clock)
        self.index = MemoryPrefixIndex(clock)
        self.away = False
        self.hangs = False  # while away: nobody answers, instead of a refusal at once
        self.cut_off: set[str] = set()  # names of processes that cannot reach it
        self._rng = rng

    def go_away(self, *, hangs: bool) -> None:
        self.away, self.hangs = True, hangs

    def come_back(self, *, empty: bool) -> None:
        self.away = False
        if empty:
            self.membership.lose_everything()
            self.index.lose_everything()

    async def call(self, process: Process, method: Any, *args: Any, **kwargs: Any) -> Any:
        """One round trip, whose answer may be lost though the store did what was asked."""
        await self._travel(process)
        result = await method(*args, **kwargs)
        await self._travel(process)
        return result

    async def _travel(self, process: Process) -> None:
        await asyncio.sleep(self._rng.uniform(0.0001, 0.001))
        away = self.away or process.name in self.cut_off
        if away and self.hangs:
            await asyncio.sleep(_TIMEOUT_S)
        if away or process.dead:
            raise StoreUnavailable("the simulated store is away")


class StoreClient:
    """One process's connection to the membership or the index: has the methods of `part`."""

    def __init__(self, store: SimStore, process: Process, part: object) -> None:
        self._store, self._process, self._part = store, process, part

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._part, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await self._store.call(self._process, method, *args, **kwargs)

        return call

    async def close(self) -> None:
        pass
