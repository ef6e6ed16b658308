"""The Decode service: one Session stream per gateway carries all its sequences.

Commands come one by one; events go out in batches, all that a step brought in one message (one
message per token cost 60 microseconds of CPU in a probe). When the stream ends, for whatever
reason, every sequence of it is cancelled.
"""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio

from services.core.errors import DiptychError, Overloaded, facts
from services.decode.sequence import DecodeOutput, DecodeParts, DecodeSequence
from services.engine.incarnation import Incarnation
from services.engine.submission import SequenceBounds
from services.transfer.fetch import prefix_offer
from services.transfer.protocol import KvSource
from services.wire.channel import abort
from services.wire.convert import attempt_id, source_from_wire
from services.wire.generated import worker_pb2, worker_pb2_grpc

# A gateway that stops reading is cut off before its events fill the memory (about 100 bytes each).
_PENDING_EVENTS_MAX = 100_000


class Session:
    """One gateway's sequences on this worker."""

    def __init__(self, parts: DecodeParts, incarnation: Incarnation, bounds: SequenceBounds) -> None:
        self._parts = parts
        self._incarnation = incarnation
        self._bounds = bounds
        self._sequences: dict[str, DecodeSequence] = {}
        self._pending: list[worker_pb2.DecodeEvent] = []
        self._wake = asyncio.Event()
        self._closing = False
        self._overflowed = False

    def handle(self, command: worker_pb2.DecodeCommand) -> None:
        if command.HasField("submit"):
            self._submit(command.submit)
        elif command.HasField("cancel"):
            seq_id = attempt_id(command.cancel.request_id, command.cancel.attempt)
            if sequence := self._sequences.get(seq_id):
                if command.cancel.choice_ids:
                    sequence.cancel_choices(command.cancel.choice_ids)
                else:
                    sequence.cancel()

    async def events(self) -> worker_pb2.DecodeEvents | None:
        """Everything that is pending, once something is. None: the gateway has said its last word."""
        while not self._pending:
            if self._closing:
                return None
            self._wake.clear()
            await self._wake.wait()
        if self._overflowed:
            raise Overloaded("the gateway does not read its events")
        batch = worker_pb2.DecodeEvents(events=self._pending)
        self._pending = []
        return batch

    def finish(self) -> None:
        """No more commands come."""
        self._closing = True
        self._wake.set()

    def close(self) -> None:
        for sequence in list(self._sequences.values()):
            sequence.cancel()

    def give_up(self, error: DiptychError) -> int:
        """End all sequences with `error`; how many there were."""
        sequences = list(self._sequences.values())
        for sequence in sequences:
            sequence.give_up(error)
        return len(sequences)

    def _submit(self, submit: worker_pb2.DecodeSubmit) -> None:
        """Start a sequence; what is wrong with it goes back as its only event."""
        wire = submit.sequence
        seq_id = attempt_id(wire.request_id, wire.attempt)
        try:
            self._incarnation.check(submit.epoch, "decode")
            source = _source(submit)
            sequence = DecodeSequence(
                self._bounds.submission(wire, "receive" if source else "local"),
                source,
                self._parts,
                emit=lambda output: self._emit(wire, output),
                on_end=lambda: self._forget(seq_id),
                prefix=prefix_offer(wire),
                vocab_size=self._bounds.vocab_size,
            )
            sequence.open()
            self._sequences[seq_id] = sequence
        except DiptychError as error:
            self._parts.on_failed(error)
            self._emit(wire, worker_pb2.WorkerFailure(code=facts(error).label, message=error.message))

    def _emit(self, sequence: worker_pb2.Sequence, output: DecodeOutput) -> None:
        event = worker_pb2.DecodeEvent(request_id=sequence.request_id, attempt=sequence.attempt)
        match output:
            case worker_pb2.SampledToken():
                event.token.CopyFrom(output)
            case worker_pb2.DecodeReserved():
                event.reserved.CopyFrom(output)
            case worker_pb2.DecodeStarted():
                event.started.CopyFrom(output)
            case worker_pb2.PromptLogprobs():
                event.prompt_logprobs.CopyFrom(output)
            case worker_pb2.WorkerFailure():
                event.failure.CopyFrom(output)
        self._pending.append(event)
        self._wake.set()
        if len(self._pending) > _PENDING_EVENTS_MAX and not self._overflowed:
            self._overflowed = True
            self.close()

    def _forget(self, seq_id: str) -> None:
        self._sequences.pop(seq_id, None)


class DecodeService(worker_pb2_grpc.DecodeServicer):
    def __init__(self, parts: DecodeParts, incarnation: Incarnation, bounds: SequenceBounds) -> None:
        self._parts = parts
        self._incarnation = incarnation
        self._bounds = bounds
        self._sessions: set[Session] = set()

    def give_up(self, error: DiptychError) -> int:
        """End all sequences of all gateways with `error`; how many there were."""
        return sum(session.give_up(error) for session in self._sessions)

    def finish(self) -> None:
        """End each stream once its gateway has been sent everything."""
        for session in self._sessions:
            session.finish()

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.DecodeCommand],
        context: "grpc.aio.ServicerContext[worker_pb2.DecodeCommand, worker_pb2.DecodeEvents]",
    ) -> AsyncIterator[worker_pb2.DecodeEvents]:
        session = Session(self._parts, self._incarnation, self._bounds)
        self._sessions.add(session)
        reading = asyncio.create_task(_read(request_iterator, session))
        try:
            while (events := await session.events()) is not None:
                yield events
        except DiptychError as error:
            await abort(context, error)
        finally:
            reading.cancel()
            session.close()
            self._sessions.discard(session)


async def _read(commands: AsyncIterator[worker_pb2.DecodeCommand], session: Session) -> None:
    try:
        async for command in commands:
            session.handle(command)
    finally:
        session.finish()


def _source(submit: worker_pb2.DecodeSubmit) -> KvSource | None:
    if not submit.HasField("source"):
        return None
    return KvSource(*source_from_wire(submit.source))
