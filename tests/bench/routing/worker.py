"""A simulated worker: the production engine, whose steps take the measured times, and what others hear of it.

send(command) -> [turn: commands, report, step, report] -> events to the listeners of their sequences
                                                        -> the prefix index, in batches, as in production
                                                        -> reports to membership, which arrive late
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from services.core.block_hash import Compatibility
from services.core.sampling import SamplingParams
from services.core.worker_report import Role, WorkerKey, WorkerReport
from services.engine.engine import Engine
from services.engine.messages import (
    Admitted,
    Advanced,
    Command,
    Drop,
    Gauges,
    Lend,
    Limits,
    Refused,
    Report,
    Revoked,
    Submit,
    Token,
)
from services.engine.runner import Outcome, Row
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from services.worker.config import WorkerConfig
from services.worker.indexed_chains import IndexedChains
from services.worker.publisher import BATCH_BLOCKS_MAX
from tests.bench.routing.step_table import Noise, StepTable, rows_ms
from tests.bench.routing.timeline import Timeline, immediate

MODEL = "measured"
CONSTANT_TOKEN = 7
_GAUGES = tuple(set(WorkerReport.__struct_fields__) & set(Gauges.__struct_fields__))  # that are reported
INDEX_BATCH_S = 0.05  # as services/worker/publisher.py

Event = Admitted | Advanced | Token | Revoked | Refused
Listener = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reporting:
    """How old a worker's report is when a gateway reads it: `late_s`, up to `every_s` more, and up to the
    gateway's own period."""

    every_s: float = 0.1
    late_s: float = 0.25


@dataclass(slots=True)
class Work:
    """What a worker has done since the start."""

    busy_s: float = 0.0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    lent: int = 0
    lent_tokens: int = 0


class _StepClock:
    """The timeline's time; inside a step, which the timeline sees as one moment, the step's own."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self.ahead_s = 0.0

    def now(self) -> float:
        return self._timeline.now() + self.ahead_s

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("an engine never sleeps")


@dataclass(slots=True)
class MeasuredRunner:
    """A model that answers a constant after the measured time of a step, with noise."""

    table: StepTable
    noise: Noise
    rng: random.Random
    clock: _StepClock

    def prepare(self, params: SamplingParams) -> bool:
        return True

    def run(self, rows: Sequence[Row]) -> list[Outcome]:
        self.clock.ahead_s = rows_ms(self.table, rows) * self.noise.factor(self.rng) / 1e3
        return [Outcome([CONSTANT_TOKEN] * len(row.samples), [None] * len(row.samples)) for row in rows]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        raise AssertionError("every request has one choice: nothing forks")


@dataclass(slots=True)
class Store:
    """What all workers and gateways share."""

    index: MemoryPrefixIndex
    membership: MemoryMembership


class Worker:
    def __init__(
        self,
        worker_id: str,
        role: Role,
        *,
        block_size: int,
        blocks: int,
        timeline: Timeline,
        store: Store,
        table: StepTable,
        noise: Noise,
        reporting: Reporting,
        rng: random.Random,
    ) -> None:
        self.key = WorkerKey(worker_id, 1)
        self.role: Role = role
        self.work = Work()
        self.link_free_s = 0.0  # when all KV that others read from here will have left
        self._timeline, self._store, self._reporting = timeline, store, reporting
        self._clock = _StepClock(timeline)
        self._compatibility = Compatibility(model=MODEL, revision="", block_size=block_size, layout="none")
        runner = MeasuredRunner(table, noise, rng, self._clock)
        self.engine = Engine(runner, self._compatibility, blocks, _limits(), self._clock)
        self._blocks, self._block_size = blocks, block_size
        self._gauges = Gauges(blocks_total=blocks, blocks_free=blocks)
        self._gauges_at_s = 0.0
        self._described: WorkerReport | None = None  # with these gauges
        self._listeners: dict[str, Listener] = {}
        self._inbox: list[Command] = []
        self._busy = False
        self._chains = IndexedChains(WorkerConfig().index_blocks_max)
        self._publishing = False
        self._beat = 0

    def start(self, phase_s: float) -> None:
        """Report now and from then on; `phase_s` keeps workers from doing so all at once."""
        immediate(self._store.membership.announce(self._report()))
        immediate(self._store.index.begin(self.key))
        self._timeline.after(phase_s, self._announce)

    def submit(self, submit: Submit | Lend, listener: Listener) -> None:
        self._listeners[submit.seq_id] = listener
        self.send(submit)

    def send(self, command: Command) -> None:
        self._inbox.append(command)
        if not self._busy:
            self._busy = True
            self._timeline.after(0.0, self._turn)

    def drop(self, seq_id: str) -> None:
        """End a sequence; its listener hears nothing more."""
        self._listeners.pop(seq_id, None)
        self.send(Drop(seq_id))

    @property
    def idle(self) -> bool:
        """Nobody owns a block here, and nothing is on its way to the engine."""
        free = self._gauges.blocks_free + self._gauges.blocks_cached == self._gauges.blocks_total
        return free and not self._inbox and not self._busy and not self._listeners

    def carry(self, tokens: int, ready_s: float, ms_per_token: float) -> float:
        """Send KV that is ready at that time to another worker: when it is there. One link carries all."""
        begin_s = max(ready_s, self.link_free_s)
        self.link_free_s = begin_s + tokens * ms_per_token / 1e3
        return self.link_free_s

    # A turn of the engine, as services.engine.process.serve does it

    def _turn(self) -> None:
        commands, self._inbox = self._inbox, []
        for command in commands:
            self.engine.handle(command)
        self._deliver()
        progressed = self.engine.step()
        step_s, self._clock.ahead_s = self._clock.ahead_s, 0.0
        self._timeline.after(step_s, self._end_turn, progressed, step_s)

    def _end_turn(self, progressed: bool, step_s: float) -> None:
        self.work.busy_s += step_s
        self._deliver()
        if progressed or self._inbox:
            self._turn()
        else:
            self._busy = False

    def _deliver(self) -> None:
        if not self.engine.has_report:
            return
        report = self.engine.take_report()
        self._count(report)
        for event in (*report.admitted, *report.refused, *report.advanced, *report.tokens, *report.revoked):
            if listener := self._listeners.get(event.seq_id):
                if isinstance(event, Refused) or (isinstance(event, Token) and event.finish):
                    del self._listeners[event.seq_id]
                listener(event)
        self._publish_later(report)

    def _count(self, report: Report) -> None:
        self._gauges, self._gauges_at_s = report.gauges, self._timeline.now()
        self._described = None
        self.work.preemptions = report.gauges.preemptions
        if report.step:
            self.work.steps += 1
            self.work.prefill_tokens += report.step.prefill_tokens
            self.work.decode_tokens += report.step.decode_tokens

    # What others hear

    def _publish_later(self, report: Report) -> None:
        self._chains.record(report.stored, report.evicted)
        if self._chains.changed and not self._publishing:
            self._publishing = True
            self._timeline.after(INDEX_BATCH_S, self._publish)

    def _publish(self) -> None:
        self._publishing = False
        while self._chains.changed:
            immediate(self._store.index.publish(self.key, *self._chains.take_changes(BATCH_BLOCKS_MAX)))

    def _announce(self) -> None:
        report = self._report()
        self._timeline.after(self._reporting.late_s, self._arrive, report)
        self._timeline.after(self._reporting.every_s, self._announce)

    def _arrive(self, report: WorkerReport) -> None:
        immediate(self._store.membership.announce(report))

    def _report(self) -> WorkerReport:
        """As services.worker.main: what the engine said last."""
        self._beat += 1
        if self._described is None:
            self._described = self._description()
        load_age_ms = 1e3 * (self._timeline.now() - self._gauges_at_s)
        return msgspec.structs.replace(self._described, beat=self._beat, load_age_ms=load_age_ms)

    def _description(self) -> WorkerReport:
        """Gauges and reports name things alike."""
        return WorkerReport(
            worker_id=self.key.worker_id,
            epoch=self.key.epoch,
            role=self.role,
            state="ready",
            address=f"{self.key.worker_id}:1",
            served_model=MODEL,
            compatibility=self._compatibility,
            context_tokens_max=self._blocks * self._block_size,
            chunk_tokens_max=WorkerConfig().chunk_tokens_max,
            **{name: getattr(self._gauges, name) for name in _GAUGES},
        )


def _limits() -> Limits:
    defaults = WorkerConfig()
    return Limits(
        sequences_max=defaults.sequences_max,
        waiting_max=defaults.waiting_max,
        chunk_tokens_max=defaults.chunk_tokens_max,
        step_ms_target=defaults.step_ms_target,
    )
