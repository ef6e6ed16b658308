"""Token sources: workers without a model, in a process of their own.

They announce themselves as workers do and answer Prefill.Run and Decode.Session over real gRPC. Each decode
worker sends one message a step with a token of every sequence it has.

    python -m tests.bench.gateway.source ORDER OUTPUT

ends with SIGTERM, and then writes the times of everything it said to the file OUTPUT.
"""

import asyncio
import itertools
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop

from router.step_model import StepModel
from services.core.block_hash import Compatibility
from services.core.child_tasks import ChildTasks
from services.core.clock import SystemClock
from services.core.worker_report import Role, WorkerReport, sequence_tag
from services.engine.incarnation import random_epoch
from services.membership.redis_membership import RedisMembership
from services.wire.channel import listen, new_server
from services.wire.convert import attempt_id, choices_from_wire, sampled_to_wire
from services.wire.generated import worker_pb2, worker_pb2_grpc
from services.worker.announcer import Announcer
from tests.bench.gateway.load import Load, Served, SourceOrder

NEWEST = 64
BLOCKS = 1 << 20
CONTEXT_TOKENS_MAX = 8192
# Nearly free, so that the gateway never lets a request wait for a place.
MODEL = StepModel(step=0.01, token=0.0001, sequence=0.0001)


class Answers:
    """What every sequence gets, and when it got it, by the request's id."""

    def __init__(self, load: Load, token_ids: list[int]) -> None:
        self.load = load
        self.served: dict[str, Served] = {}
        self._token_ids = token_ids

    def of(self, request_id: str) -> Served:
        return self.served.setdefault(request_id, Served())

    def token(self, sequence: worker_pb2.Sequence, index: int, choice: int) -> worker_pb2.SampledToken:
        finish = "length" if index + 1 == sequence.sampling.max_tokens else None
        return sampled_to_wire(index, self._token_ids[index % len(self._token_ids)], finish, choice)


@dataclass(slots=True)
class Running:
    sequence: worker_pb2.Sequence
    choices: tuple[int, ...]
    served: Served
    index: int  # of the next token
    begins_at: float
    started: bool = False


class Steps:
    """One gateway's sequences on one decode worker."""

    def __init__(self, answers: Answers, taken: deque[int]) -> None:
        self._answers, self._taken = answers, taken
        self._running: dict[str, Running] = {}
        self._reserved: list[worker_pb2.DecodeEvent] = []
        self._wake = asyncio.Event()
        self._next_at = 0.0

    @property
    def running(self) -> int:
        return len(self._running)

    def obey(self, command: worker_pb2.DecodeCommand) -> None:
        if command.HasField("cancel"):
            if not command.cancel.choice_ids:
                self._running.pop(attempt_id(command.cancel.request_id, command.cancel.attempt), None)
            return
        sequence = command.submit.sequence
        seq_id = attempt_id(sequence.request_id, sequence.attempt)
        alone = not command.submit.HasField("source")
        self._running[seq_id] = Running(
            sequence,
            choices_from_wire(sequence),
            self._answers.of(sequence.request_id),
            len(sequence.output_ids) + (not alone),
            time.monotonic() + self._answers.load.prefill_ms / 1e3,
        )
        self._taken.append(sequence_tag(seq_id))
        self._reserved.append(_event(sequence, reserved=worker_pb2.DecodeReserved()))
        self._wake.set()

    async def messages(self) -> AsyncIterator[worker_pb2.DecodeEvents]:
        while True:
            if not self._running and not self._reserved:
                self._wake.clear()
                await self._wake.wait()
            await self._until_next_step()
            events = [*self._reserved, *self._step()]
            self._reserved = []
            if events:
                yield worker_pb2.DecodeEvents(events=events)

    async def _until_next_step(self) -> None:
        period = 1 / self._answers.load.steps_per_s if self._answers.load.steps_per_s else 0.0
        now = time.monotonic()
        self._next_at = max(self._next_at + period, now)
        await asyncio.sleep(self._next_at - now)

    def _step(self) -> Iterator[worker_pb2.DecodeEvent]:
        now = time.monotonic()
        for seq_id, running in list(self._running.items()):
            if running.begins_at > now:
                continue
            sequence = running.sequence
            if not running.started:
                running.started = True
                yield _event(sequence, started=worker_pb2.DecodeStarted())
            for choice in running.choices:
                yield _event(sequence, token=self._answers.token(sequence, running.index, choice))
            running.served.emitted_at.append(now)
            running.index += 1
            if running.index == sequence.sampling.max_tokens:
                del self._running[seq_id]


class Worker(worker_pb2_grpc.PrefillServicer, worker_pb2_grpc.DecodeServicer):
    def __init__(self, worker_id: str, role: Role, answers: Answers, served_model: str) -> None:
        self._worker_id, self._role, self._answers, self._model = worker_id, role, answers, served_model
        self._epoch = random_epoch()
        self._newest: deque[int] = deque(maxlen=NEWEST)
        self._sessions: list[Steps] = []
        self._server = new_server()
        worker_pb2_grpc.add_PrefillServicer_to_server(self, self._server)
        worker_pb2_grpc.add_DecodeServicer_to_server(self, self._server)
        self._address = f"127.0.0.1:{listen(self._server, '127.0.0.1', 0)}"

    async def __aenter__(self) -> "Worker":
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)

    def report(self) -> WorkerReport:
        return WorkerReport(
            worker_id=self._worker_id,
            epoch=self._epoch,
            role=self._role,
            state="ready",
            address=self._address,
            served_model=self._model,
            compatibility=Compatibility(model=self._model, revision="none", layout="none"),
            context_tokens_max=CONTEXT_TOKENS_MAX,
            blocks_total=BLOCKS,
            blocks_free=BLOCKS,
            running=sum(session.running for session in self._sessions),
            model=MODEL,
            newest=list(self._newest),
        )

    async def Run(self, request, context) -> worker_pb2.PrefillReply:
        sequence, served = request.sequence, self._answers.of(request.sequence.request_id)
        served.run_at = time.monotonic()
        self._newest.append(sequence_tag(attempt_id(sequence.request_id, sequence.attempt)))
        if self._answers.load.prefill_ms:
            await asyncio.sleep(self._answers.load.prefill_ms / 1e3)
        index = len(sequence.output_ids)
        firsts = [self._answers.token(sequence, index, choice) for choice in choices_from_wire(sequence)]
        served.replied_at = time.monotonic()
        return worker_pb2.PrefillReply(firsts=firsts, compute_ms=self._answers.load.prefill_ms)

    async def Session(self, request_iterator, context) -> AsyncIterator[worker_pb2.DecodeEvents]:
        steps = Steps(self._answers, self._newest)
        self._sessions.append(steps)
        async with ChildTasks() as tasks:
            tasks.start(_obey(request_iterator, steps))
            async for message in steps.messages():
                yield message


async def _obey(commands: AsyncIterator[worker_pb2.DecodeCommand], steps: Steps) -> None:
    async for command in commands:
        steps.obey(command)


def _event(sequence: worker_pb2.Sequence, **event) -> worker_pb2.DecodeEvent:
    return worker_pb2.DecodeEvent(request_id=sequence.request_id, attempt=sequence.attempt, **event)


async def serve(order: SourceOrder) -> dict[str, Served]:
    """Until SIGTERM."""
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    answers, clock = Answers(order.load, order.token_ids), SystemClock()
    roles = itertools.chain(
        itertools.repeat("prefill", order.prefills), itertools.repeat("decode", order.decodes)
    )
    membership = RedisMembership(order.redis)
    async with AsyncExitStack() as stack, ChildTasks() as tasks:
        for number, role in enumerate(roles):
            worker = Worker(f"{role}-{number}", role, answers, order.served_model)
            await stack.enter_async_context(worker)
            tasks.start(Announcer(membership, worker.report, clock).run())
        await stopped.wait()
    await membership.close()
    return answers.served


if __name__ == "__main__":
    served = uvloop.run(serve(msgspec.json.decode(sys.argv[1], type=SourceOrder)))
    Path(sys.argv[2]).write_bytes(msgspec.msgpack.encode(served))
