"""The in-memory twin of EngineHandle: a real Engine over an ArithmeticRunner, in this process.

One turn of the engine is one callback of the event loop, so everything else runs between two steps,
as it does beside a real engine process.
"""

import asyncio
from collections.abc import Callable

from services.core.block_hash import Compatibility
from services.core.clock import SystemClock
from services.engine.engine import Engine
from services.engine.handle import EngineHandle
from services.engine.messages import Command, Landed, Limits, Report
from services.engine.runner import ArithmeticRunner
from services.model.pool_geometry import PoolGeometry

VOCAB = 49_152  # the default model's: its tokenizer makes text of every token
LIMITS = Limits(sequences_max=16, waiting_max=64, chunk_tokens_max=8, step_ms_target=100.0)


def geometry(blocks: int, block_size: int = 4) -> PoolGeometry:
    return PoolGeometry(blocks, layers=1, kv_heads=1, block_size=block_size, head_dim=1)


def compatibility(block_size: int = 4) -> Compatibility:
    return Compatibility(
        model="arithmetic", revision="1", block_size=block_size, layout=geometry(1, block_size).layout
    )


def build_engine(pool: memoryview, blocks: int, limits: Limits = LIMITS, block_size: int = 4) -> Engine:
    shape = geometry(blocks, block_size)
    runner, generations = ArithmeticRunner(shape, pool, VOCAB), shape.generations(pool)
    return Engine(runner, compatibility(block_size), blocks, limits, SystemClock(), generations)


class InProcessEngine(EngineHandle):
    def __init__(
        self,
        blocks: int = 64,
        on_report: Callable[[Report], None] = lambda report: None,
        limits: Limits = LIMITS,
        block_size: int = 4,
    ) -> None:
        super().__init__(sequences_max=1_000, on_report=on_report, clock=SystemClock())
        self.geometry = geometry(blocks, block_size)
        self.pool = memoryview(bytearray(self.geometry.shared_bytes))
        self.engine = build_engine(self.pool, blocks, limits, block_size)
        self.landed_tokens = 0  # of the receive that told last
        self.paused = False
        self.steps_left: int | None = None  # pauses after so many steps; None: never
        self._commands: list[Command] = []
        self._scheduled = False

    def send(self, command: Command) -> None:
        if isinstance(command, Landed):
            self.landed_tokens = command.tokens
        self._commands.append(command)
        self._schedule()

    def resume(self) -> None:
        self.paused, self.steps_left = False, None
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        if self.paused:
            return
        commands, self._commands = self._commands, []
        for command in commands:
            self.engine.handle(command)
        self._report()
        progressed = self.engine.step()
        self._report()
        if progressed and self.steps_left is not None:
            self.steps_left -= 1
            self.paused = self.steps_left == 0
        if progressed or self._commands:
            self._schedule()

    def _report(self) -> None:
        if self.engine.has_report:
            self._dispatch(self.engine.take_report())
