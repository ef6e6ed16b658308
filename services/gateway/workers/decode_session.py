"""One Decode.Session stream: all sequences of this gateway on one incarnation of a decode worker.

A writer task sends submissions and cancels in order; a reader task hands each message's events to those whose
sequences they are of, without a task in between. When the stream breaks, every open sequence fails, and the
session is over for good.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import grpc
import grpc.aio

from services.core.errors import DiptychError, WorkerLost, facts, from_label
from services.core.worker_report import WorkerReport
from services.gateway.workers.nonsense import nonsense
from services.gateway.workers.sequence_wire import cancel_command, event_from_wire, submit_command
from services.gateway.workers.worker_client import DecodeEvent, OutputToken, Sequence
from services.wire.channel import from_rpc_error, parsed
from services.wire.generated import worker_pb2, worker_pb2_grpc

SequenceKey = tuple[str, int]  # request id, attempt


@dataclass(slots=True, eq=False)
class _Open:
    """A sequence that runs on the worker."""

    sequence: Sequence
    deliver: Callable[[DecodeEvent], None]
    running: set[int]  # choices
    over: asyncio.Future[None]

    def take(self, event: DecodeEvent) -> None:
        self.deliver(event)
        if isinstance(event, OutputToken) and event.finish is not None:
            self.running.discard(event.choice)
            if not self.running and not self.over.done():
                self.over.set_result(None)

    def fail(self, error: DiptychError) -> None:
        """The worker does not have it any more."""
        if not self.over.done():
            self.running.clear()
            self.over.set_exception(error)

    def give_up(self, error: DiptychError) -> None:
        """The worker may go on with it, and is told not to."""
        if not self.over.done():
            self.over.set_exception(error)


class DecodeSession:
    def __init__(self, stub: worker_pb2_grpc.DecodeStub, worker: WorkerReport) -> None:
        self._worker = worker
        self._call: grpc.aio.StreamStreamCall[worker_pb2.DecodeCommand, worker_pb2.DecodeEvents]
        self._call = stub.Session()
        self._commands: asyncio.Queue[worker_pb2.DecodeCommand] = asyncio.Queue()
        self._open: dict[SequenceKey, _Open] = {}
        self._failure: DiptychError | None = None
        self._writing = asyncio.create_task(self._write())
        self._reading = asyncio.create_task(self._read())

    @property
    def over(self) -> bool:
        return self._failure is not None

    async def decode(
        self, sequence: Sequence, source: WorkerReport | None, deliver: Callable[[DecodeEvent], None]
    ) -> None:
        """See WorkerClient.decode."""
        key = (sequence.request_id, sequence.attempt)
        assert key not in self._open, f"attempt {key} was submitted twice"
        if self._failure is not None:
            raise _copy(self._failure)
        over = asyncio.get_running_loop().create_future()
        opened = self._open[key] = _Open(sequence, deliver, set(sequence.choices), over)
        self._commands.put_nowait(submit_command(self._worker, sequence, source))
        try:
            await over
        finally:
            del self._open[key]
            if opened.running:
                self._commands.put_nowait(cancel_command(sequence))

    def end_choice(self, sequence: Sequence, choice: int) -> None:
        """See WorkerClient.end_choice."""
        if (sequence.request_id, sequence.attempt) in self._open:
            self._commands.put_nowait(cancel_command(sequence, choice))

    async def close(self) -> None:
        """Close the stream, which cancels its sequences on the worker; here they end as WorkerLost."""
        self._end(WorkerLost(f"{self._worker.worker_id}: the connection was given up"))
        self._writing.cancel()
        self._reading.cancel()
        self._call.cancel()
        await asyncio.wait([self._writing, self._reading])

    async def _write(self) -> None:
        # A broken stream also ends the reader, which reports it with the reason.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._call.write(await self._commands.get())

    async def _read(self) -> None:
        failure: DiptychError = WorkerLost(f"{self._worker.worker_id} closed the connection")
        try:
            async for message in self._call:
                for event in parsed(message, self._worker.worker_id).events:
                    self._deliver(event)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error, self._worker.worker_id)
        except WorkerLost as error:
            failure = error
        finally:
            self._end(failure)
            self._writing.cancel()
            self._call.cancel()

    def _deliver(self, wire: worker_pb2.DecodeEvent) -> None:
        opened = self._open.get((wire.request_id, wire.attempt))
        if opened is None:  # the event has crossed our cancel
            return
        event = event_from_wire(wire)
        if isinstance(event, DiptychError):
            opened.fail(event)
        elif event is not None and (found := nonsense(opened.sequence, event)):
            opened.give_up(WorkerLost(f"{self._worker.worker_id} sent {found}"))
        elif event is not None:
            opened.take(event)

    def _end(self, failure: DiptychError) -> None:
        self._failure = self._failure or failure
        for opened in self._open.values():
            opened.fail(_copy(self._failure))


def _copy(error: DiptychError) -> DiptychError:
    """One object per sequence: a raised exception collects the traceback of whoever raises it."""
    return from_label(facts(error).label, error.message)
