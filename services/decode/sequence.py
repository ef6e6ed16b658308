"""One sequence on a decode worker: reserve blocks, receive the KV, decode.

    submit ── Admitted ──┬─ no source (── fetch of a prefix) ─── Token* (the engine computes the rest)
                         └─ source ── receive_kv ── Start ─────── Token*
                                         └ failed, revoked, given up or cancelled ── Drop

It may have several choices: one transfer, and after it tokens, a finish or a cancel of each.

The blocks are written by the receiving (or fetching) task alone, and dropped only after that task has
ended: no block is reused while KV may still land in it. The gateway does not wait for that: it hears of
a failure at once, and goes on elsewhere.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.core.clock import Clock
from services.core.errors import DiptychError, EngineFailed, KvCorrupt, Overloaded, facts, from_label
from services.engine.handle import EngineHandle, Event, Stalled
from services.engine.messages import (
    Admitted,
    Advanced,
    DropChoice,
    Failed,
    Landed,
    Refused,
    Revoked,
    Scored,
    Start,
    Submit,
    Token,
)
from services.transfer.destination import Destination
from services.transfer.fetch import PrefixFetcher, PrefixOffer
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import FirstToken, KvSource, KvTransport
from services.transfer.receive import Received, ReceiveObserver, receive_kv
from services.wire.convert import prompt_logprobs_to_wire, sampled_to_wire
from services.wire.generated import worker_pb2

logger = logging.getLogger(__name__)

DecodeOutput = (
    worker_pb2.DecodeReserved
    | worker_pb2.DecodeStarted
    | worker_pb2.PromptLogprobs
    | worker_pb2.SampledToken
    | worker_pb2.WorkerFailure
)


@dataclass(frozen=True, slots=True)
class DecodeParts:
    """What every sequence of a worker works with."""

    engine: EngineHandle
    transport: KvTransport
    memory: PoolMemory
    clock: Clock
    on_received: Callable[[Received], None]
    on_failed: Callable[[DiptychError], None]
    on_pull_broke: Callable[[DiptychError], None]
    fetcher: PrefixFetcher


class DecodeSequence:
    """`emit` takes the events for the gateway; `on_end` is called once, after the last of them."""

    def __init__(
        self,
        submit: Submit,
        source: KvSource | None,
        parts: DecodeParts,
        emit: Callable[[DecodeOutput], None],
        on_end: Callable[[], None],
        prefix: PrefixOffer | None = None,
        *,
        vocab_size: int,
    ) -> None:
        self._submit = submit
        self._source = source
        self._prefix = prefix
        self._parts = parts
        self._emit = emit
        self._on_end = on_end
        self._vocab_size = vocab_size
        self._open = set(submit.choices)  # neither ended nor cancelled
        self._receiving: asyncio.Task[Received] | None = None
        self._silent = False  # the gateway hears nothing more
        self._ended = False

    def open(self) -> None:
        """Raises Overloaded, EngineFailed or EngineStalled if the engine cannot take it."""
        self._parts.engine.submit(self._submit, self._on_event)

    def cancel(self) -> None:
        """End it without a word to the gateway; a running receive ends first."""
        self._silent = True
        self._stop()

    def cancel_choices(self, choices: Iterable[int]) -> None:
        """End these choices; the last one ends all."""
        for choice in self._open.intersection(choices):
            self._open.remove(choice)
            if self._open:
                self._parts.engine.send(DropChoice(self._submit.seq_id, choice))
            else:
                self.cancel()

    def give_up(self, error: DiptychError) -> None:
        """End it with `error`, which the gateway hears at once; a running receive ends first."""
        self._tell(error)
        self._stop()

    def _tell(self, error: DiptychError) -> None:
        if not self._silent and not self._ended:
            self._silent = True
            self._parts.on_failed(error)
            self._emit(worker_pb2.WorkerFailure(code=facts(error).label, message=error.message))

    def _stop(self) -> None:
        if not self._is_receiving:
            self._end()
            return
        assert self._receiving is not None
        if not self._receiving.cancelling():  # a second time would interrupt its cleaning up
            self._receiving.cancel()

    @property
    def _is_receiving(self) -> bool:
        return self._receiving is not None and not self._receiving.done()

    def _on_event(self, event: Event) -> None:
        match event:
            case Admitted():
                self._admitted(event)
            case Scored():
                self._emit(prompt_logprobs_to_wire(event.logprobs))
            case Token():
                self._token(event)
            case Refused():  # the engine does not have the sequence, or is gone itself
                self.give_up(from_label(event.code, event.message))
            case Failed():
                if event.choice in self._open:  # else it crossed the choice's cancel
                    self.give_up(from_label(event.code, event.message))
            case Stalled():
                self.give_up(event.error)
            case Revoked():
                if self._is_receiving:  # else Start is on its way to the engine, and wins
                    self.give_up(Overloaded("the decode worker needed the reserved KV blocks"))
            case Advanced():
                raise AssertionError("only a prefill sequence advances")

    def _token(self, event: Token) -> None:
        if event.choice not in self._open:
            return  # it crossed the choice's cancel
        self._emit(sampled_to_wire(event.index, event.token, event.finish, event.choice, event.logprobs))
        if event.finish:
            self._open.remove(event.choice)
            if not self._open:
                self._parts.engine.forget(self._submit.seq_id)
                self._end()

    def _admitted(self, event: Admitted) -> None:
        if self._source is not None:
            self._emit(worker_pb2.DecodeReserved())
            self._begin_receive(self._source, event)
        elif event.fetch_tokens:
            self._emit(worker_pb2.DecodeReserved())
            self._begin_fetch(event)
        else:
            self._emit(worker_pb2.DecodeStarted(cached_tokens=event.cached_tokens, queue_ms=event.queue_ms))

    def _begin_fetch(self, event: Admitted) -> None:
        assert self._prefix is not None
        self._parts.fetcher.start(
            *(self._prefix, event.block_ids, event.cached_tokens, event.fetch_tokens),
            done=lambda fetched: self._emit(
                worker_pb2.DecodeStarted(
                    cached_tokens=event.cached_tokens,
                    queue_ms=event.queue_ms,
                    fetched_tokens=fetched.tokens,
                    fetch_ms=fetched.ms,
                )
            ),
        )

    def _begin_receive(self, source: KvSource, event: Admitted) -> None:
        self._receiving = asyncio.create_task(self._receive(source, event))
        # Not in the task itself: one that is cancelled before its first turn never runs a line.
        self._receiving.add_done_callback(lambda task: self._received(event, task))

    async def _receive(self, source: KvSource, admitted: Admitted) -> Received:
        engine, seq_id = self._parts.engine, self._submit.seq_id
        tokens = len(self._submit.prompt_ids) + len(self._submit.output_ids)
        return await receive_kv(
            self._parts.transport,
            source,
            seq_id,
            Destination(self._parts.memory, admitted.block_ids, tokens, admitted.cached_tokens),
            self._parts.clock,
            ReceiveObserver(
                landed=lambda tokens, proven: engine.send(Landed(seq_id, tokens, proven)),
                broke=self._parts.on_pull_broke,
            ),
        )

    def _received(self, admitted: Admitted, task: "asyncio.Task[Received]") -> None:
        """The receive has ended, one way or the other: nothing writes to the blocks any more."""
        if task.cancelled():
            self._end()
        elif error := task.exception():
            self.give_up(error if isinstance(error, DiptychError) else _broken(error))
        elif self._silent:  # it was done before it could be cancelled
            self._end()
        elif not self._are_first(task.result().firsts):
            self.give_up(KvCorrupt("the source sent other first tokens than the sequence has choices"))
        else:
            self._start(admitted, task.result())

    def _are_first(self, firsts: Iterable[FirstToken]) -> bool:
        """Whether they are one token of each choice."""
        index = len(self._submit.output_ids)
        tokens = all(0 <= first.token < self._vocab_size and first.index == index for first in firsts)
        return tokens and sorted(first.choice for first in firsts) == sorted(self._submit.choices)

    def _start(self, admitted: Admitted, received: Received) -> None:
        self._parts.on_received(received)
        # Choices may have ended at their first token, which the gateway has from P.
        self._open -= {first.choice for first in received.firsts if first.finish}
        if not self._open:
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
        firsts = {first.choice: first.token for first in received.firsts if first.choice in self._open}
        self._parts.engine.send(Start(self._submit.seq_id, firsts))

    def _end(self) -> None:
        """Give everything back, once."""
        if not self._ended:
            self._ended = True
            seq_id = self._submit.seq_id
            self._parts.fetcher.stop(seq_id, then=lambda: self._parts.engine.drop(seq_id))
            self._on_end()


def _broken(error: BaseException) -> DiptychError:
    """A bug of ours in a receive: it is logged, and the request still gets an answer elsewhere."""
    logger.error("a KV receive broke", exc_info=error)
    return EngineFailed(f"the KV receive broke: {error!r}")
