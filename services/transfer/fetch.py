"""A prefix that another worker has cached, fetched before the rest of a prompt is computed.

    start ── lend (the source keeps the blocks) ── pull ── confirm ──┬── done(PrefixFetched), always
                              └ failed, too slow ────────────────────┘
    stop ── the fetch is cancelled ── `then`, once nothing writes to the blocks any more

A fetch only ever saves time. It is given as long as computing the same tokens would take: so the most it
can lose is what it might have saved. What has landed and is proven by then stays.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from services.core.clock import Clock
from services.core.errors import (
    DeadlineExceeded,
    DiptychError,
    EngineFailed,
    KvLinkLost,
    KvSourceLost,
)
from services.transfer.destination import Destination
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import KvSource, KvTransport, loan_id
from services.transfer.receive import ReceiveObserver, receive_lent
from services.wire.convert import attempt_id, source_from_wire
from services.wire.generated import worker_pb2

# Bounds of the patience. Below the least, one busy step of the source's engine would end a fetch; beyond
# the most, a client would notice more than a pause. Before anything was measured: between the two.
PATIENCE_MIN_S, PATIENCE_UNMEASURED_S, PATIENCE_MAX_S = 0.5, 2.0, 10.0
# A source that did not answer is not asked again for this long: by then the cluster knows of its end.
AVOID_S = 3.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrefixOffer:
    """A sequence, and who is believed to have the KV of its leading tokens."""

    seq_id: str
    source: KvSource
    known_ids: Sequence[int]
    salt: str


@dataclass(frozen=True, slots=True)
class _Order:
    offer: PrefixOffer
    destination: Destination

    @property
    def lacking(self) -> int:
        return self.destination.tokens - self.destination.held_tokens


@dataclass(frozen=True, slots=True)
class PrefixFetched:
    """What a fetch has brought."""

    tokens: int  # proven ones, beyond those that were held
    bytes: int
    ms: float
    error: DiptychError | None  # why it is not all that was hoped for


@dataclass(frozen=True, slots=True)
class FetchObserver:
    """Who is told what. `compute_ms` is asked how long so many tokens, with so many before them, would take
    to compute here; 0: not measured."""

    landed: Callable[[str, int, int], None]  # sequence; tokens that are here; proven ones
    ended: Callable[[str, PrefixFetched], None]  # nothing writes to the sequence's blocks any more
    broke: Callable[[DiptychError], None]  # a pull broke and is tried again
    compute_ms: Callable[[int, int], float]


@dataclass(slots=True)
class _Running:
    task: "asyncio.Task[PrefixFetched]"
    then: Callable[[], None] | None = None  # it was stopped


class PrefixFetcher:
    """The fetches of one worker, at most one for each of its sequences."""

    def __init__(
        self, transport: KvTransport, memory: PoolMemory, clock: Clock, observer: FetchObserver
    ) -> None:
        self._transport, self._memory, self._clock = transport, memory, clock
        self._observer = observer
        self._running: dict[str, _Running] = {}
        self._avoided_until: dict[KvSource, float] = {}

    def start(
        self,
        offer: PrefixOffer,
        block_ids: Sequence[int],
        held_tokens: int,
        tokens: int,
        done: Callable[[PrefixFetched], None],
    ) -> None:
        """Fetch the KV of the sequence's tokens [held_tokens, tokens) in the background into its blocks,
        which `block_ids` are from the first token on. `done` is called at the end, unless it is stopped."""
        assert offer.seq_id not in self._running, f"{offer.seq_id} fetches already"
        order = _Order(offer, Destination(self._memory, block_ids, tokens, held_tokens))
        task = asyncio.create_task(self._fetch(order), name=f"fetch-{offer.seq_id}")
        self._running[offer.seq_id] = _Running(task)
        # Not in the task itself: one that is cancelled before its first turn never runs a line.
        task.add_done_callback(lambda task: self._ended(offer.seq_id, task, done))

    def stop(self, seq_id: str, then: Callable[[], None]) -> None:
        """Call `then` when nothing writes to the sequence's blocks: at once if it fetches nothing."""
        running = self._running.get(seq_id)
        if running is None:
            then()
            return
        running.then = running.then or then
        if not running.task.cancelling():  # a second time would interrupt its cleaning up
            running.task.cancel()

    def _ended(
        self, seq_id: str, task: "asyncio.Task[PrefixFetched]", done: Callable[[PrefixFetched], None]
    ) -> None:
        running = self._running.pop(seq_id)
        if running.then is not None:
            running.then()
        elif not task.cancelled():  # else the event loop itself ends
            fetched = task.result()
            self._observer.ended(seq_id, fetched)
            done(fetched)

    async def _fetch(self, order: _Order) -> PrefixFetched:
        """Never raises."""
        source, started_s = order.offer.source, self._clock.now()
        progress = _Progress(order.destination.held_tokens)
        error: DiptychError | None = None
        try:
            async with asyncio.timeout(self._patience_s(order)):
                await self._lend_and_receive(order, progress)
        except TimeoutError:
            error = DeadlineExceeded(f"{source.worker_id} lent a prefix too slowly")
        except DiptychError as failure:
            error = failure
        except Exception as bug:
            logger.exception("a prefix fetch broke")
            error = EngineFailed(f"the prefix fetch broke: {bug!r}")
        if isinstance(error, DeadlineExceeded | KvLinkLost):
            self._avoid(source)
        tokens = progress.proven - order.destination.held_tokens
        token_bytes = self._memory.block_bytes // self._memory.block_size
        return PrefixFetched(tokens, tokens * token_bytes, (self._clock.now() - started_s) * 1e3, error)

    async def _lend_and_receive(self, order: _Order, progress: "_Progress") -> None:
        offer, source, transfer_id = order.offer, order.offer.source, loan_id(order.offer.seq_id)
        if self._avoided_until.get(source, 0.0) > self._clock.now():
            raise KvSourceLost(f"{source.worker_id} did not answer a moment ago")

        def landed(tokens: int, proven: int) -> None:
            progress.proven = proven
            self._observer.landed(offer.seq_id, tokens, proven)

        observer = ReceiveObserver(landed, self._observer.broke)
        wanted = offer.known_ids[: order.destination.tokens]
        try:
            lent = await self._transport.lend(source, transfer_id, wanted, offer.salt)
            destination = _shortened(order.destination, lent, source)
            await receive_lent(self._transport, source, transfer_id, destination, self._clock, observer)
        except BaseException:
            self._transport.abandon(source, transfer_id)
            raise

    def _patience_s(self, order: _Order) -> float:
        compute_ms = self._observer.compute_ms(order.lacking, order.destination.held_tokens)
        if compute_ms == 0.0:
            return PATIENCE_UNMEASURED_S
        return min(max(compute_ms / 1e3, PATIENCE_MIN_S), PATIENCE_MAX_S)

    def _avoid(self, source: KvSource) -> None:
        now = self._clock.now()
        self._avoided_until = {one: end for one, end in self._avoided_until.items() if end > now}
        self._avoided_until[source] = now + AVOID_S


@dataclass(slots=True)
class _Progress:
    proven: int  # the KV of all tokens before is here and right


def _shortened(destination: Destination, lent: int, source: KvSource) -> Destination:
    """To what the source has. Raises KvSourceLost if that is nothing new."""
    if not destination.held_tokens < lent <= destination.tokens:
        raise KvSourceLost(
            f"{source.worker_id} lends {lent} tokens where {destination.held_tokens} are held and "
            f"{destination.tokens} were asked for"
        )
    return replace(destination, tokens=lent)


def prefix_offer(sequence: worker_pb2.Sequence) -> PrefixOffer | None:
    """What the gateway says about a sequence's prefix, if anything. Raises BadRequest."""
    if not sequence.HasField("prefix"):
        return None
    return PrefixOffer(
        attempt_id(sequence.request_id, sequence.attempt),
        KvSource(*source_from_wire(sequence.prefix.worker)),
        [*sequence.prompt_ids, *sequence.output_ids],
        sequence.salt,
    )
