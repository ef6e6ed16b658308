"""One Decode.Session stream: all sequences of this gateway on one incarnation of a decode worker.

A writer task sends submissions and cancels in order; a reader task sorts each message's events into
one inbox per sequence. An inbox holds at most the tokens of its answer, so none needs a bound of its
own. When the stream breaks, every open sequence fails, and the session is over for good.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

import grpc
import grpc.aio

from services.core.errors import DiptychError, WorkerLost, facts, from_label
from services.core.worker_report import WorkerReport
from services.gateway.workers.sequence_wire import cancel_command, event_from_wire, submit_command
from services.gateway.workers.worker_client import DecodeEvent, OutputToken, Sequence
from services.wire.channel import from_rpc_error
from services.wire.generated import worker_pb2, worker_pb2_grpc

SequenceKey = tuple[str, int]  # request id, attempt


class DecodeSession:
    def __init__(self, stub: worker_pb2_grpc.DecodeStub, worker: WorkerReport) -> None:
        self._worker = worker
        self._call: grpc.aio.StreamStreamCall[worker_pb2.DecodeCommand, worker_pb2.DecodeEvents]
        self._call = stub.Session()
        self._commands: asyncio.Queue[worker_pb2.DecodeCommand] = asyncio.Queue()
        self._inboxes: dict[SequenceKey, asyncio.Queue[DecodeEvent | DiptychError]] = {}
        self._failure: DiptychError | None = None
        self._writing = asyncio.create_task(self._write())
        self._reading = asyncio.create_task(self._read())

    @property
    def over(self) -> bool:
        return self._failure is not None

    async def decode(
        self, sequence: Sequence, source: WorkerReport | None
    ) -> AsyncGenerator[DecodeEvent, None]:
        """See WorkerClient.decode."""
        key = (sequence.request_id, sequence.attempt)
        assert key not in self._inboxes, f"attempt {key} was submitted twice"
        if self._failure is not None:
            raise _copy(self._failure)
        inbox = self._inboxes[key] = asyncio.Queue()
        self._commands.put_nowait(submit_command(self._worker, sequence, source))
        running = set(sequence.choices)
        try:
            while running:
                event = await inbox.get()
                if isinstance(event, DiptychError):
                    running.clear()
                    raise event
                if isinstance(event, OutputToken) and event.finish is not None:
                    running.discard(event.choice)
                yield event
        finally:
            del self._inboxes[key]
            if running:
                self._commands.put_nowait(cancel_command(sequence))

    def end_choice(self, sequence: Sequence, choice: int) -> None:
        """See WorkerClient.end_choice."""
        if (sequence.request_id, sequence.attempt) in self._inboxes:
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
                for event in message.events:
                    self._deliver(event)
        except grpc.aio.AioRpcError as error:
            failure = from_rpc_error(error, self._worker.worker_id)
        finally:
            self._end(failure)
            self._writing.cancel()

    def _deliver(self, wire: worker_pb2.DecodeEvent) -> None:
        inbox = self._inboxes.get((wire.request_id, wire.attempt))
        event = event_from_wire(wire)
        if inbox is not None and event is not None:  # events that crossed our cancel have no inbox
            inbox.put_nowait(event)

    def _end(self, failure: DiptychError) -> None:
        self._failure = self._failure or failure
        for inbox in self._inboxes.values():
            inbox.put_nowait(_copy(self._failure))


def _copy(error: DiptychError) -> DiptychError:
    """One object per sequence: a raised exception collects the traceback of whoever raises it."""
    return from_label(facts(error).label, error.message)
