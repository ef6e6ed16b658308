"""The brain of a worker: a synchronous object that turns commands and steps into reports.

    handle(command)*  ->  step()  ->  take_report()

It holds the sequences, asks the scheduler what to run, runs it, commits the results. It knows no
process, socket or thread: `services.engine.process` drives it in production, tests call it directly.
"""

from collections import deque
from collections.abc import Callable
from functools import lru_cache

import msgspec

from router.step_model import StepWork, context_of
from services.core.block_hash import Compatibility, chain_hashes, chain_root
from services.core.clock import Clock
from services.core.errors import FACTS, DiptychError, KvSourceLost, Overloaded, Unanswerable, facts
from services.core.worker_report import sequence_tag
from services.engine.block_pool import BlockPool, Generations
from services.engine.messages import (
    Admitted,
    Advanced,
    Command,
    Drop,
    DropChoice,
    Failed,
    Fetched,
    Gauges,
    Landed,
    Lend,
    Limits,
    Ping,
    Refused,
    Report,
    Revoked,
    Scored,
    Start,
    Step,
    Submit,
    Token,
)
from services.engine.runner import ModelRunner, Outcome, Row
from services.engine.scheduler import Chunk, Scheduler
from services.engine.sequence import Sequence, State
from services.engine.step_times import StepTimes
from services.engine.warm_up import warm_up

_RESERVED = (State.RECEIVING, State.REVOKED)
_WRITTEN = (*_RESERVED, State.FETCHING)  # KV may be on its way into the blocks
# Sequences that are named in reports: as many as may come between two of them, at 128 a second.
_NEWEST = 32
# Steps expected to take longer are announced before they run; shorter ones are no reason for a message.
_LONG_STEP_S = 0.5
# A step like none before, such as the first one: weights are touched for the first time, kernels compiled.
_UNMEASURED_STEP_S = 5.0


class Engine:
    def __init__(
        self,
        runner: ModelRunner,
        compatibility: Compatibility,
        blocks: int,
        limits: Limits,
        clock: Clock,
        generations: Generations | None = None,
    ) -> None:
        """`generations`: one per block, in memory that readers of the KV pool see (see BlockPool)."""
        self._runner = runner
        self._clock = clock
        self._pool = BlockPool(blocks, compatibility.block_size, generations)
        self._scheduler = Scheduler(self._pool, limits)
        self._sequences: dict[str, list[Sequence]] = {}  # several: choices that have forked
        self._preparing: dict[str, Submit] = {}  # until the runner can sample with their parameters
        self._loans: dict[str, list[int]] = {}  # cached blocks that are kept for readers elsewhere
        self._times = StepTimes()
        self._newest: deque[int] = deque(maxlen=_NEWEST)  # tags of the sequences that were taken last
        self._root: Callable[[str], bytes] = lru_cache(1024)(lambda salt: chain_root(compatibility, salt))
        self._prompt_tokens = 0
        self._prefix_hit_tokens = 0
        self._step: Step | None = None
        self._pinged = False
        self._silence_s = 0.0
        self.before_long_step: Callable[[], None] = lambda: None  # the moment to send a report
        self._clear_report()

    @property
    def has_report(self) -> bool:
        return bool(
            self._admitted or self._refused or self._advanced or self._scored or self._tokens
            or self._revoked or self._failed or self._dropped or self._step or self._pinged or self._silence_s
        )  # fmt: skip

    @property
    def preparing(self) -> bool:
        """A sequence waits for something that is made outside the steps."""
        return bool(self._preparing)

    def warm_up(self) -> None:
        """Before any command: see warm_up.py."""
        warm_up(self._runner, self._times, self._clock, self._pool.blocks, self._pool.block_size)

    def handle(self, command: Command) -> None:
        match command:
            case Submit():
                self._submit(command)
            case Lend():
                self._lend(command)
            case Landed():
                self._landed(command)
            case Fetched():
                self._fetched(command)
            case Start():
                self._start(command)
            case Drop():
                self._drop(command)
            case DropChoice():
                self._drop_choice(command)
            case Ping():
                self._pinged = True

    def step(self) -> bool:
        """Admit, schedule, run, commit. False: there was nothing to run."""
        for submit in list(self._preparing.values()):
            self._take_if_prepared(submit)
        chunks = self._scheduler.schedule(self._times)
        self._collect_admitted()
        self._collect_revoked()
        if not chunks:
            return False
        work = _work(chunks)
        self._announce_if_long(work)
        started_s = self._clock.now()
        outcomes = self._runner.run([_row(chunk) for chunk in chunks])
        self._measure(work, self._clock.now() - started_s)
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            self._commit(chunk, outcome)
        return True

    def take_report(self) -> Report:
        """Everything since the last call."""
        stored, evicted = self._pool.take_changes()
        report = Report(
            admitted=self._admitted,
            refused=self._refused,
            advanced=self._advanced,
            scored=self._scored,
            tokens=self._tokens,
            revoked=self._revoked,
            failed=self._failed,
            dropped=self._dropped,
            stored=stored,
            evicted=evicted,
            gauges=self._gauges(),
            step=self._step,
            silence_s=self._silence_s,
        )
        self._clear_report()
        return report

    def check_integrity(self) -> None:
        """Prove that every block has exactly one kind of owner; for idle moments and tests."""
        sequences = [one.blocks for group in self._sequences.values() for one in group]
        self._pool.check_integrity([*sequences, *self._loans.values()])

    # Commands

    def _submit(self, submit: Submit) -> None:
        known = submit.seq_id in self._sequences or submit.seq_id in self._preparing
        assert not known, f"sequence {submit.seq_id} submitted twice"
        self._preparing[submit.seq_id] = submit
        self._take_if_prepared(submit)

    def _take_if_prepared(self, submit: Submit) -> None:
        try:
            if not self._runner.prepare(submit.sampling):
                return
        except DiptychError as error:
            self._refused.append(Refused(submit.seq_id, facts(error).label, error.message))
        else:
            self._take(submit)
        del self._preparing[submit.seq_id]

    def _take(self, submit: Submit) -> None:
        sequence = Sequence(submit, self._root(submit.salt), self._clock.now())
        if refusal := self._refusal(sequence):
            self._refused.append(Refused(submit.seq_id, facts(refusal).label, refusal.message))
            return
        self._sequences[submit.seq_id] = [sequence]
        self._newest.append(sequence_tag(submit.seq_id))
        if sequence.state is State.RECEIVING:
            self._report_admitted(sequence)
        else:
            self._scheduler.wait(sequence)

    def _refusal(self, sequence: Sequence) -> DiptychError | None:
        """Why the sequence cannot be taken; None takes it (a reservation with its blocks)."""
        if sequence.kind == "receive":
            # A reservation never waits here: its prefill would wait with it.
            if not self._scheduler.reserve(sequence):
                return Overloaded("the decode worker has no free KV blocks for this prompt now")
        elif self._scheduler.full:
            return Overloaded("the worker's queue is full")
        return None

    def _lend(self, command: Lend) -> None:
        assert command.seq_id not in self._loans, f"loan {command.seq_id} asked for twice"
        size = self._pool.block_size
        blocks = self._pool.match(chain_hashes(command.token_ids, size, self._root(command.salt)))
        if not blocks:
            gone = KvSourceLost("the prefix is no longer cached here")
            self._refused.append(Refused(command.seq_id, facts(gone).label, gone.message))
            return
        self._pool.acquire(blocks)
        self._loans[command.seq_id] = blocks
        self._admitted.append(Admitted(command.seq_id, list(blocks), len(blocks) * size, 0.0))

    def _landed(self, command: Landed) -> None:
        if group := self._sequences.get(command.seq_id):
            (sequence,) = group
            if sequence.state is State.FETCHING:
                sequence.computed = max(sequence.computed, command.proven)
                sequence.seal(self._pool, sequence.computed)
                self._report_advance(sequence)
                return
            assert sequence.state in _RESERVED, "KV landed for a sequence that expects none"
            sequence.computed = max(sequence.computed, command.tokens)
            sequence.seal(self._pool, command.proven)

    def _fetched(self, command: Fetched) -> None:
        if group := self._sequences.get(command.seq_id):
            (sequence,) = group
            assert sequence.state is State.FETCHING, "nothing was fetched for this sequence"
            sequence.fetch_tokens = 0
            sequence.state = State.RUNNING

    def _start(self, command: Start) -> None:
        group = self._sequences.get(command.seq_id)
        if group is None:
            return  # dropped while the command was on its way
        (sequence,) = group
        assert sequence.state in _RESERVED, "started twice"
        assert sequence.computed == sequence.known, "started before all KV had landed"
        sequence.seal(self._pool, sequence.computed)
        sequence.state = State.RUNNING
        self._go_on(sequence, command.tokens)

    def _drop(self, command: Drop) -> None:
        self._preparing.pop(command.seq_id, None)
        for sequence in self._sequences.pop(command.seq_id, []):
            self._scheduler.remove(sequence)
        self._pool.release(self._loans.pop(command.seq_id, []))
        self._dropped.append(command.seq_id)

    def _drop_choice(self, command: DropChoice) -> None:
        if submit := self._preparing.get(command.seq_id):
            choices = tuple(choice for choice in submit.choices if choice != command.choice)
            self._preparing[command.seq_id] = msgspec.structs.replace(submit, choices=choices)
        for sequence in list(self._sequences.get(command.seq_id, [])):
            if command.choice in sequence.choices:
                sequence.serve([choice for choice in sequence.choices if choice != command.choice])
                if not sequence.choices:
                    assert sequence.state not in _WRITTEN, "KV may be on its way into the blocks"
                    self._remove(sequence)

    # Results of a step

    def _commit(self, chunk: Chunk, outcome: Outcome) -> None:
        sequence = chunk.sequence
        sequence.computed += chunk.tokens
        sequence.seal(self._pool, sequence.computed)
        self._report_advance(sequence)
        if outcome.scored is not None:
            self._scored.append(Scored(sequence.seq_id, outcome.scored))
            sequence.scored(sequence.computed)
        if outcome.tokens:
            self._sampled(sequence, outcome)

    def _report_advance(self, sequence: Sequence) -> None:
        if sequence.kind == "prefill":
            self._advanced.append(Advanced(sequence.seq_id, sequence.computed, list(sequence.blocks)))

    def _sampled(self, sequence: Sequence, outcome: Outcome) -> None:
        """Report a token of each choice; those that it does not end go on."""
        index = len(sequence.output_ids)
        going_on: dict[int, int] = {}
        for place, choice in enumerate(sequence.choices):
            if reason := outcome.failures.get(place):
                self._failed.append(Failed(sequence.seq_id, choice, FACTS[Unanswerable].label, reason))
                continue
            token, logprobs = outcome.tokens[place], outcome.logprobs[place]
            finish = "stop" if place in outcome.complete else sequence.params.finish(token, index + 1)
            self._tokens.append(Token(sequence.seq_id, index, token, finish, choice, logprobs))
            if not finish:
                going_on[choice] = token
        if sequence.kind == "prefill":
            sequence.state = State.HELD
        elif going_on:
            self._go_on(sequence, going_on)
        else:
            self._remove(sequence)

    def _go_on(self, sequence: Sequence, tokens: dict[int, int]) -> None:
        """Continue each choice with its token. The first keeps the sequence, the others fork from it."""
        forks: list[Sequence] = []
        if len(sequence.choices) > 1:
            first, *others = tokens
            forks = self._fork(sequence, others)
            sequence.serve([first])
        for one in (sequence, *forks):
            one.append(tokens[one.choices[0]])

    def _fork(self, sequence: Sequence, choices: list[int]) -> list[Sequence]:
        """A sequence for each of `choices`, with the full blocks in common and a copy of the partial one.

        Each choice writes the KV of its token into that block in its next step: copying it here is copy
        on write, at the latest moment.
        """
        forks = [sequence.fork(choice) for choice in choices]
        if copies := self._scheduler.fork(sequence, forks):
            self._runner.copy_blocks(copies)
        self._sequences[sequence.seq_id] += forks
        return forks

    def _remove(self, sequence: Sequence) -> None:
        """A choice has ended; the last one ends its group."""
        self._scheduler.remove(sequence)
        group = self._sequences[sequence.seq_id]
        group.remove(sequence)
        if not group:
            del self._sequences[sequence.seq_id]

    def _measure(self, work: StepWork, seconds: float) -> None:
        self._times.add(seconds * 1e3, work)
        self._step = Step(seconds, work.tokens, work.sequences)

    def _announce_if_long(self, work: StepWork) -> None:
        expected_ms = self._times.expected_ms(work)
        expected_s = _UNMEASURED_STEP_S if expected_ms is None else expected_ms / 1e3
        if expected_s > _LONG_STEP_S:
            self._silence_s = expected_s
            self.before_long_step()
            self._silence_s = 0.0

    # The report

    def _report_admitted(self, sequence: Sequence) -> None:
        if sequence.reported:  # it comes back from a preemption
            return
        sequence.reported = True
        self._prompt_tokens += sequence.known
        self._prefix_hit_tokens += sequence.computed
        queue_ms = (self._clock.now() - sequence.arrived_s) * 1e3
        waits_for = sequence.fetch_tokens if sequence.state is State.FETCHING else 0
        self._admitted.append(
            Admitted(sequence.seq_id, list(sequence.blocks), sequence.computed, queue_ms, waits_for)
        )

    def _collect_admitted(self) -> None:
        for sequence in self._scheduler.newly_running:
            self._report_admitted(sequence)
        self._scheduler.newly_running.clear()

    def _collect_revoked(self) -> None:
        self._revoked.extend(Revoked(sequence.seq_id) for sequence in self._scheduler.revoked)
        self._scheduler.revoked.clear()

    def _clear_report(self) -> None:
        self._admitted: list[Admitted] = []
        self._refused: list[Refused] = []
        self._advanced: list[Advanced] = []
        self._scored: list[Scored] = []
        self._tokens: list[Token] = []
        self._revoked: list[Revoked] = []
        self._failed: list[Failed] = []
        self._dropped: list[str] = []
        self._step = None
        self._pinged = False

    def _gauges(self) -> Gauges:
        queued = [s for s in self._scheduler.sequences() if s.computes_prompt]
        return Gauges(
            blocks_total=self._pool.blocks,
            blocks_free=self._pool.free,
            blocks_cached=self._pool.cached,
            running=len(self._scheduler.admitted),
            waiting=len(self._scheduler.waiting),
            queued_prefill_tokens=sum(s.to_compute for s in queued),
            queued_prefill_context=sum(context_of(s.to_compute, s.known - s.to_compute) for s in queued),
            running_context=sum(s.known for s in self._scheduler.admitted if s.kind != "prefill"),
            model=self._times.model,
            newest=list(self._newest),
            prompt_tokens=self._prompt_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            preemptions=self._scheduler.preemptions,
        )


def _work(chunks: list[Chunk]) -> StepWork:
    prompts = [chunk for chunk in chunks if not chunk.sequence.decoding]
    decoding = [chunk.sequence for chunk in chunks if chunk.sequence.decoding]
    return StepWork(
        tokens=sum(chunk.tokens for chunk in prompts),
        token_context=sum(context_of(chunk.tokens, chunk.sequence.computed) for chunk in prompts),
        sequences=len(decoding),
        context=sum(sequence.known for sequence in decoding),
    )


def _row(chunk: Chunk) -> Row:
    sequence = chunk.sequence
    end = sequence.computed + chunk.tokens
    samples = sequence.samples if end == sequence.known else []
    tokens = sequence.tokens[sequence.computed : end]
    return Row(tokens, sequence.computed, sequence.blocks, samples, sequence.targets(end))
