"""A server that is ready, asked by the common client."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.cpu.client import Taken, Target, put_load
from tests.bench.cpu.figures import Figures
from tests.bench.cpu.load import Cell
from tests.bench.cpu.processes import memory_mib

WARM_UP_REQUESTS = 8
WARM_UP_ANSWER_TOKENS = 8
WARM_UP_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Served:
    """An Opened. `pids`: the roots of its processes."""

    target: Target
    pids: Sequence[int]
    command: str

    def warm_up(self, cell: Cell) -> None:
        few = min(cell.concurrency, WARM_UP_REQUESTS)
        asyncio.run(self._ask(cell.prompts("warm-up")[:few], WARM_UP_ANSWER_TOKENS, few, WARM_UP_LIMIT_S))

    def measure(self, cell: Cell, repetition: str) -> Figures:
        prompts, answer_tokens = cell.prompts(repetition), cell.shape.answer_tokens
        taken = asyncio.run(self._ask(prompts, answer_tokens, cell.concurrency, cell.limit_s))
        return Figures.of(taken, memory_mib(self.pids))

    async def _ask(
        self, prompts: Sequence[Sequence[int]], answer_tokens: int, concurrency: int, limit_s: float
    ) -> Taken:
        return await put_load(self.target, prompts, answer_tokens, concurrency, limit_s)
