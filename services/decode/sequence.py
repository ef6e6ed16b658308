"""One sequence on a decode worker: reserve blocks, receive the KV, decode.

    submit ── Admitted ──┬─ no source ─────────────────────────── Token* (the engine computes all)
                         └─ source ── receive_kv ── Start ─────── Token*
                                         └ failed, revoked or cancelled ── Drop

The blocks are written by the receiving task alone, and dropped only after that task has ended: no
block is reused while KV may still land in it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from services.core.clock import Clock
from services.core.errors import DiptychError, Overloaded, facts, from_label
from services.engine.handle import EngineHandle, Event
from services.engine.messages import Admitted, Advanced, Landed, Refused, Revoked, Start, Submit, Token
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import KvSource, KvTransport
from services.transfer.receive import Destination, Received, receive_kv
from services.wire.convert import sampled_to_wire
from services.wire.generated import worker_pb2

DecodeOutput = worker_pb2.DecodeStarted | worker_pb2.SampledToken | worker_pb2.WorkerFailure


@dataclass(frozen=True, slots=True)
class DecodeParts:
    """What every sequence of a worker works with."""

    engine: EngineHandle
    transport: KvTransport
    memory: PoolMemory
    clock: Clock
    on_received: Callable[[Received], None]
    on_failed: Callable[[DiptychError], None]


class DecodeSequence:
    """`emit` takes the events for the gateway; `on_end` is called once, after the last of them."""

    def __init__(
        self,
        submit: Submit,
        source: KvSource | None,
        parts: DecodeParts,
        emit: Callable[[DecodeOutput], None],
        on_end: Callable[[], None],
    ) -> None:
        self._submit = submit
        self._source = source
        self._parts = parts
        self._emit = emit
        self._on_end = on_end
        self._receiving: asyncio.Task[None] | None = None
        self._revoked = False
        self._ended = False

    def open(self) -> None:
        """Raises Overloaded or EngineFailed if the engine cannot take it."""
        self._parts.engine.submit(self._submit, self._on_event)

    def cancel(self) -> None:
        """End it without a word to the gateway; a running receive ends first."""
        if self._is_receiving:
            assert self._receiving is not None
            self._receiving.cancel()
        else:
            self._end()

    @property
    def _is_receiving(self) -> bool:
        return self._receiving is not None and not self._receiving.done()

    def _on_event(self, event: Event) -> None:
        match event:
            case Admitted():
                self._admitted(event)
            case Token():
                self._emit(sampled_to_wire(event.index, event.token, event.finish))
                if event.finish:
                    self._end()
            case Refused():
                self._refused(from_label(event.code, event.message))
            case Revoked():
                if self._is_receiving:  # else Start is on its way to the engine, and wins
                    self._revoked = True
                    self.cancel()
            case Advanced():
                raise AssertionError("only a prefill sequence advances")

    def _admitted(self, event: Admitted) -> None:
        if self._source is None:
            self._emit(worker_pb2.DecodeStarted(cached_tokens=event.cached_tokens, queue_ms=event.queue_ms))
        else:
            self._receiving = asyncio.create_task(self._receive(self._source, event))

    def _refused(self, error: DiptychError) -> None:
        """The engine does not have the sequence, or is gone itself."""
        if self._is_receiving:
            self.cancel()
        self._fail(error)

    async def _receive(self, source: KvSource, admitted: Admitted) -> None:
        """Bring the KV in. However this ends, nothing writes to the blocks afterwards."""
        try:
            received = await self._pull(source, admitted)
        except DiptychError as error:
            self._fail(error)
        except asyncio.CancelledError:
            if self._revoked:
                self._fail(Overloaded("the decode worker needed the reserved KV blocks"))
            else:
                self._end()
            raise
        else:
            self._start(admitted, received)

    async def _pull(self, source: KvSource, admitted: Admitted) -> Received:
        engine, seq_id = self._parts.engine, self._submit.seq_id
        tokens = len(self._submit.prompt_ids) + len(self._submit.output_ids)
        return await receive_kv(
            self._parts.transport,
            source,
            seq_id,
            Destination(self._parts.memory, admitted.block_ids, tokens, admitted.cached_tokens),
            self._parts.clock,
            landed=lambda position: engine.send(Landed(seq_id, position)),
        )

    def _start(self, admitted: Admitted, received: Received) -> None:
        self._parts.on_received(received)
        if received.first.finish:  # the answer ended at its first token, which the gateway has from P
            self._end()
            return
        self._emit(
            worker_pb2.DecodeStarted(
                cached_tokens=admitted.cached_tokens,
                queue_ms=admitted.queue_ms,
                transferred_bytes=received.bytes,
                transfer_ms=received.transfer_ms,
                exposed_ms=received.exposed_ms,
            )
        )
        self._parts.engine.send(Start(self._submit.seq_id, received.first.token))

    def _fail(self, error: DiptychError) -> None:
        if not self._ended:
            self._parts.on_failed(error)
            self._emit(worker_pb2.WorkerFailure(code=facts(error).label, message=error.message))
            self._end()

    def _end(self) -> None:
        """Give everything back. The engine has forgotten a sequence that finished: then drop does nothing."""
        if not self._ended:
            self._ended = True
            self._parts.engine.drop(self._submit.seq_id)
            self._on_end()
