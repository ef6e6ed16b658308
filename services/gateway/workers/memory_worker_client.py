"""The in-memory twin of the gRPC worker client: a cluster of scripted workers, with faults.

The answer of a sequence is a pure function of its prompt, as with real workers and a fixed seed: an
attempt that resumes another one goes on with the same tokens. Choice n leaves out the first n tokens
of the answer. One that is to follow a grammar is complete at its end. `script` queues faults, each used
by the next call of its kind on its worker; `running`, `cancelled` and `ended_choices` show what happened
to the calls.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from services.core.child_tasks import ChildTasks
from services.core.errors import WorkerLost
from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.core.worker_report import WorkerKey, WorkerReport
from services.gateway.workers.worker_client import DecodeEvent, OutputToken, PrefillResult, Sequence, Started

ANY_WORKER = "*"  # in `script`: whichever worker is called next
CallKind = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong in one call: it fails with `error`; or hangs, until `end` is set if there is one."""

    error: Exception | None = None
    after_tokens: int = 0  # that the call delivers first
    end: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    kind: CallKind
    worker: WorkerKey
    sequence: Sequence
    source: WorkerKey | None = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class MemoryWorkerClient:
    """`answer_of(prompt_ids)` gives the ids that the model would say; they repeat up to max_tokens."""

    def __init__(self, answer_of: Callable[[list[int]], list[int]]) -> None:
        self._answer_of = answer_of
        self._faults: defaultdict[tuple[str, CallKind], deque[Fault]] = defaultdict(deque)
        self.calls: list[Call] = []  # all there ever were
        self.running: list[Call] = []
        self.cancelled: list[Call] = []
        self.ended_choices: list[tuple[Call, int]] = []

    def script(self, worker_id: str, kind: CallKind, *faults: Fault) -> None:
        self._faults[worker_id, kind].extend(faults)

    async def prefill(self, worker: WorkerReport, sequence: Sequence, *, expect_pull: bool) -> PrefillResult:
        with self._call(Call("prefill", worker.key, sequence)) as call:
            fault = self._next_fault(worker, "prefill")
            if fault is not None:
                await self._suffer(fault, call)
            await asyncio.sleep(0)
            scored = prompt_scores(sequence)
            return PrefillResult(self._firsts(sequence), 0, 0.0, 0.0, prompt_logprobs=scored)

    async def decode(
        self,
        worker: WorkerReport,
        sequence: Sequence,
        source: WorkerReport | None,
        deliver: Callable[[DecodeEvent], None],
    ) -> None:
        with self._call(Call("decode", worker.key, sequence, source.key if source else None)) as call:
            fault = self._next_fault(worker, "decode")
            first = len(sequence.output_ids)
            going_on = set(sequence.choices)
            if source is not None:  # their first tokens are known
                first += 1
                going_on -= {token.choice for token in self._firsts(sequence) if token.finish}
            if fault is None or fault.after_tokens:
                deliver(Started(0, 0.0, 0, 0.0, 0.0))
                if source is None:
                    for part in prompt_scores(sequence):
                        deliver(part)
            for index in range(first, sequence.sampling.max_tokens):
                if fault is not None and index - first == fault.after_tokens:
                    await self._suffer(fault, call)
                await self._turn(call)
                for choice in sequence.choices:
                    if choice in going_on and (call, choice) not in self.ended_choices:
                        token = self._token(sequence, index, choice)
                        deliver(token)
                        if token.finish:
                            going_on.remove(choice)
                if not going_on:
                    return

    def end_choice(self, worker: WorkerReport, sequence: Sequence, choice: int) -> None:
        for call in self.running:
            if (call.kind, call.worker, call.sequence) == ("decode", worker.key, sequence):
                self.ended_choices.append((call, choice))

    async def keep_only(self, live: Collection[WorkerReport]) -> None:
        keys = {worker.key for worker in live}
        for call in self.running:
            if call.worker not in keys:
                call.lost.set()

    async def close(self) -> None:
        await self.keep_only([])

    def _firsts(self, sequence: Sequence) -> tuple[OutputToken, ...]:
        index = len(sequence.output_ids)
        return tuple(self._token(sequence, index, choice) for choice in sequence.choices)

    def _token(self, sequence: Sequence, index: int, choice: int) -> OutputToken:
        answer = self._answer_of(sequence.prompt_ids)
        token = answer[(index + choice) % len(answer)]
        top = sequence.sampling.top_logprobs
        logprobs = None if top is None else scores_of(token, top)
        complete = sequence.sampling.grammar and (index + choice + 1) % len(answer) == 0
        finish = "stop" if complete else sequence.sampling.finish(token, index + 1)
        return OutputToken(index, token, finish, choice, logprobs)

    def _next_fault(self, worker: WorkerReport, kind: CallKind) -> Fault | None:
        faults = self._faults[worker.worker_id, kind] or self._faults[ANY_WORKER, kind]
        return faults.popleft() if faults else None

    @contextmanager
    def _call(self, call: Call) -> Iterator[Call]:
        self.calls.append(call)
        self.running.append(call)
        try:
            yield call
        except asyncio.CancelledError:
            self.cancelled.append(call)
            raise
        finally:
            self.running.remove(call)

    async def _suffer(self, fault: Fault, call: Call) -> None:
        if fault.error is not None:
            raise fault.error
        async with ChildTasks() as tasks:
            waits = [tasks.start(fault.end.wait()), tasks.start(call.lost.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        await self._turn(call)

    async def _turn(self, call: Call) -> None:
        """Let others run, as a real worker does between two tokens."""
        await asyncio.sleep(0)
        if call.lost.is_set():
            raise WorkerLost(f"{call.worker.worker_id} left the cluster")


def scores_of(token: int, top: int) -> TokenLogprobs:
    """What this model says of a token, wherever it is: it is one of the three most probable ones."""
    rank = 1 + token % 3
    best = [token + place + 1 - rank for place in range(top)]
    return TokenLogprobs(-rank / 4, rank, tuple(best), tuple(-(place + 1) / 4 for place in range(top)))


def prompt_scores(sequence: Sequence) -> tuple[PromptLogprobs, ...]:
    """Of a prompt's tokens from the second one on, if they are asked for: in parts of four."""
    top, ids = sequence.sampling.prompt_logprobs, sequence.prompt_ids
    if top is None:
        return ()
    return tuple(
        PromptLogprobs.of(first, top, [scores_of(token, top) for token in ids[first : first + 4]])
        for first in range(1, len(ids), 4)
    )
