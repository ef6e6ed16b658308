"""A worker's engine process in the simulator: the production Engine, whose steps take virtual time."""

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from services.core.clock import Clock
from services.engine.engine import Engine
from services.engine.handle import EngineHandle
from services.engine.messages import Command, EngineSetup, Report
from services.engine.runner import ArithmeticRunner, Outcome, Row
from tests.sim.loop import Process

VOCAB = 512
_INTEGRITY_EVERY = 8  # steps between two checks of the block pool's books


class SteppingClock:
    """The loop's time; inside a step, which the loop sees as one moment, the step's own."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.ahead_s = 0.0

    def now(self) -> float:
        return self._clock.now() + self.ahead_s

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long steps take."""

    rng: random.Random
    step_ms: float
    prefill_ms: float  # for each prompt token
    decode_ms: float  # for each decoding sequence

    @classmethod
    def of(cls, rng: random.Random) -> "Pace":
        return cls(
            rng, step_ms=rng.choice([2.0, 10.0, 40.0]), prefill_ms=rng.choice([0.5, 3.0]), decode_ms=1.0
        )

    def step_s(self, rows: Sequence[Row]) -> float:
        ms = self.step_ms
        for row in rows:
            ms += self.decode_ms if len(row.tokens) == 1 else self.prefill_ms * len(row.tokens)
        return ms * self.rng.uniform(0.8, 1.3) / 1e3


class TimedRunner(ArithmeticRunner):
    """An arithmetic model that takes time."""

    def __init__(self, setup: EngineSetup, pool: memoryview, clock: SteppingClock, pace: Pace) -> None:
        super().__init__(setup.geometry, pool, VOCAB)
        self._clock, self._pace = clock, pace

    def run(self, rows: Sequence[Row]) -> list[Outcome]:
        self._clock.ahead_s = self._pace.step_s(rows)
        return super().run(rows)


class SimEngine(EngineHandle):
    """EngineHandle over an engine in a simulated process beside the worker's own."""

    def __init__(
        self,
        sequences_max: int,
        on_report: Callable[[Report], None],
        clock: Clock,
        *,
        io: Process,
        process: Process,
        rng: random.Random,
        pace: Pace,
        on_bug: Callable[[str], None],
        events: "Counter[str]",
        build: "Callable[[EngineSetup, memoryview, SteppingClock, Pace], Engine] | None" = None,
    ) -> None:
        super().__init__(sequences_max, on_report, clock)
        self.process = process
        self.engine: Engine | None = None
        self._io = io
        self._rng = rng
        self._pace = pace
        self._on_bug = on_bug
        self._events = events
        self._build = build or build_engine
        self._stepping_clock = SteppingClock(clock)
        self._commands = _Pipe(process, rng, self._command_came)
        self._reports = _Pipe(io, rng, self._report_came)
        self._inbox: list[Command] = []
        self._busy = False
        self._steps = 0
        self._decode_command = msgspec.msgpack.Decoder(Command)
        self._decode_report = msgspec.msgpack.Decoder(Report)

    async def start(self, setup: EngineSetup) -> None:
        await self._clock.sleep(self._rng.uniform(0.05, 0.5))  # loads the model
        self.block_bytes = setup.geometry.block_bytes
        self.pool = memoryview(bytearray(setup.geometry.shared_bytes))
        self.engine = self._build(setup, self.pool, self._stepping_clock, self._pace)
        self.engine.before_long_step = self._send_report
        self.engine.before_long_step = self._send_report

    def send(self, command: Command) -> None:
        if not self.process.dead and not self._io.dead:
            self._commands.send(self._encoder.encode(command))

    def kill(self) -> None:
        """SIGKILL of the engine process: the worker sees its end of the pipe close."""
        if not self.process.dead:
            self.process.kill()
            self._io.call_later(0.001, self._pipe_closed)

    async def stop(self) -> None:
        self.process.kill()

    def check(self) -> None:
        if self.engine is not None and not self.process.dead:
            self.engine.check_integrity()

    def owns(self, block: int) -> bool:
        """Whether a sequence has the block; True when there is no engine to ask."""
        return self.engine is None or self.process.dead or self.engine._pool._references[block] > 0

    def reuse_blocks(self) -> bool:
        """Write over every block that nobody owns, as a burst of other work does. False: there is none."""
        if self.engine is None or self.process.dead:
            return False
        pool = self.engine._pool
        taken = pool.allocate(pool.available)
        for block in taken:
            self._overwrite(block)
        pool.release(taken)
        return bool(taken)

    # In the engine's process

    def _command_came(self, body: bytes) -> None:
        self._inbox.append(self._decode_command.decode(body))
        self._wake()

    def _wake(self) -> None:
        if not self._busy:
            self._busy = True
            self.process.call_later(0.0, self._turn)

    def _turn(self) -> None:
        """As services.engine.process.serve does it; the report of a step comes when its time is over."""
        if self.process.dead:
            return
        try:
            progressed = self._run()
        except Exception as error:
            self._on_bug(f"{self.process.name} crashed: {error!r}")
            self.kill()
            return
        step_s, self._stepping_clock.ahead_s = self._stepping_clock.ahead_s, 0.0
        self.process.call_later(step_s, self._end_turn, progressed)

    def _run(self) -> bool:
        assert self.engine is not None
        commands, self._inbox = self._inbox, []
        for command in commands:
            self.engine.handle(command)
        self._send_report()
        progressed = self.engine.step()
        self._steps += progressed
        if self._steps % _INTEGRITY_EVERY == 0:
            self.engine.check_integrity()
        return progressed

    def _end_turn(self, progressed: bool) -> None:
        if self.process.dead:
            return
        self._send_report()
        self._busy = False
        if progressed or self._inbox:
            self._wake()

    def _overwrite(self, block: int) -> None:
        size = self.block_bytes
        self.pool[block * size : (block + 1) * size] = b"\x55" * size

    def _send_report(self) -> None:
        assert self.engine is not None
        if self.engine.has_report:
            self._reports.send(msgspec.msgpack.encode(self.engine.take_report()))

    # In the worker's process

    def _report_came(self, body: bytes) -> None:
        if not self._io.dead and not self.failed.is_set():
            report = self._decode_report.decode(body)
            self._count(report)
            self._dispatch(report)

    def _count(self, report: Report) -> None:
        self._events["revocations"] += len(report.revoked)
        self._events["refusals"] += len(report.refused)
        self._events["evictions"] += len(report.evicted)
        self._events["preemptions"] += report.gauges.preemptions - self.gauges.preemptions
        self._events["prefix_hit_tokens"] += report.gauges.prefix_hit_tokens - self.gauges.prefix_hit_tokens

    def _pipe_closed(self) -> None:
        if not self._io.dead:
            self._fail_all()


def build_engine(setup: EngineSetup, pool: memoryview, clock: SteppingClock, pace: Pace) -> Engine:
    runner = TimedRunner(setup, pool, clock, pace)
    generations = setup.geometry.generations(pool)
    return Engine(runner, setup.compatibility, setup.geometry.blocks, setup.limits, clock, generations)


class _Pipe:
    """Messages to a process, in order."""

    def __init__(self, receiver: Process, rng: random.Random, on_message: Callable[[bytes], None]) -> None:
        self._receiver, self._rng, self._on_message = receiver, rng, on_message
        self._in_flight: deque[bytes] = deque()

    def send(self, body: bytes) -> None:
        self._in_flight.append(body)
        self._receiver.call_later(self._rng.uniform(0.00005, 0.0005), self._arrive)

    def _arrive(self) -> None:
        self._on_message(self._in_flight.popleft())
