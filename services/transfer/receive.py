"""The reader's side of a transfer, free of any transport.

What has been pulled counts only when the source has confirmed that it still held the lease: until
`receive_kv` returns, nothing of it may be decoded from. A pull that breaks goes on from the token it
reached, as long as the source keeps the lease.
"""

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from services.core.clock import Clock
from services.core.errors import DiptychError, KvCorrupt, KvLinkLost, KvSourceLost, LeaseExpired
from services.transfer.destination import Destination
from services.transfer.protocol import Arrived, FirstToken, KvSource, KvTransport

# A pull that broke is tried again after these pauses, if no more than RETRY_FOR_S have passed since the
# first break without progress: by then keepalive (2 s) has found a dead source, and another is better.
_PAUSES_S = (0.0, 0.05, 0.2, 0.5)
_RETRY_FOR_S = 2.0
_BREAKS = (KvLinkLost, KvCorrupt)


@dataclass(frozen=True, slots=True)
class Received:
    firsts: tuple[FirstToken, ...]  # one of each choice
    bytes: int
    transfer_ms: float  # from the pull's opening to the confirmed lease
    exposed_ms: float  # from the end of the prefill to the confirmed lease


@dataclass(frozen=True, slots=True)
class ReceiveObserver:
    """Who is told what during a receive."""

    landed: Callable[[int, int], None]  # tokens that are here, and the leading ones that are proven
    broke: Callable[[DiptychError], None] = lambda error: None  # a pull broke and is tried again


async def receive_kv(
    transport: KvTransport,
    source: KvSource,
    transfer_id: str,
    destination: Destination,
    clock: Clock,
    observer: ReceiveObserver,
) -> Received:
    """Pull, place and confirm.

    Raises KvSourceLost, KvLinkLost, KvCorrupt, KvStale, LeaseExpired or Incompatible; of what was
    received only the proven part is right then, and the source is told that it may free the blocks.
    """
    try:
        return await _Receive(transport, source, transfer_id, destination, clock, observer).run()
    except BaseException:
        transport.abandon(source, transfer_id)
        raise


async def receive_lent(
    transport: KvTransport,
    source: KvSource,
    transfer_id: str,
    destination: Destination,
    clock: Clock,
    observer: ReceiveObserver,
) -> None:
    """Pull, place and confirm a lent prefix: all of it is proven when this returns. Raises the errors of
    `receive_kv`; the source keeps the blocks then until it is told."""
    await _Receive(transport, source, transfer_id, destination, clock, observer).run_lent()


@dataclass(slots=True)
class _Receive:
    _transport: KvTransport
    _source: KvSource
    _transfer_id: str
    _destination: Destination
    _clock: Clock
    _observer: ReceiveObserver
    _position: int = field(init=False)  # the KV of all tokens before is in place
    _proven: int = field(init=False)
    _bytes: int = 0

    def __post_init__(self) -> None:
        self._position = self._proven = self._destination.held_tokens

    async def run(self) -> Received:
        started_s = self._clock.now()
        last = await self._pull_all()
        arrived_s = self._clock.now()
        if last is None or not last.firsts:
            raise self._too_short()
        await self._confirm()
        confirmed_s = self._clock.now()
        exposed_ms = last.exposed_ms + (confirmed_s - arrived_s) * 1e3
        return Received(last.firsts, self._bytes, (confirmed_s - started_s) * 1e3, exposed_ms)

    async def run_lent(self) -> None:
        await self._pull_all()
        await self._confirm()
        self._observer.landed(self._position, self._position)

    async def _confirm(self) -> None:
        if self._position != self._destination.tokens:
            raise self._too_short()
        if not await self._transport.release(self._source, self._transfer_id):
            raise LeaseExpired(
                f"the lease of transfer {self._transfer_id} had ended before the KV was confirmed"
            )

    def _too_short(self) -> KvSourceLost:
        return KvSourceLost(f"the transfer ended after {self._position} of {self._destination.tokens} tokens")

    async def _pull_all(self) -> Arrived | None:
        """The last value of the pull that reached the end."""
        tries, broken_s = 0, 0.0
        while True:
            before = self._position
            try:
                return await self._pull_from_position()
            except _BREAKS as error:
                if self._position > before:
                    tries = 0
                broken_s = self._clock.now() if tries == 0 else broken_s
                if tries == len(_PAUSES_S) or self._clock.now() - broken_s > _RETRY_FOR_S:
                    raise
                self._observer.broke(error)
                await self._clock.sleep(_PAUSES_S[tries])
                tries += 1

    async def _pull_from_position(self) -> Arrived | None:
        last: Arrived | None = None
        pulling = self._transport.pull(self._source, self._transfer_id, self._destination, self._position)
        async with aclosing(pulling) as arriving:
            async for last in arriving:
                self._advance(last)
        return last

    def _advance(self, arrived: Arrived) -> None:
        if arrived.first_token != self._position:
            raise KvCorrupt(f"expected the KV of token {self._position}, got that of {arrived.first_token}")
        if arrived.proven and self._proven == self._position:
            self._proven += arrived.tokens
        self._position += arrived.tokens
        self._bytes += arrived.bytes
        self._observer.landed(self._position, self._proven)
