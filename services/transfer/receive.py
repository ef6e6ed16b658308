"""The decode worker's side of a transfer, free of any transport.

What has been pulled counts only when the source has confirmed that it still held the lease: until
`receive_kv` returns, nothing of it may be decoded from or given a hash.
"""

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from services.core.clock import Clock
from services.core.errors import KvCorrupt, KvSourceLost, LeaseExpired
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import FirstToken, KvChunk, KvSource, KvTransport


@dataclass(frozen=True, slots=True)
class Received:
    first: FirstToken
    bytes: int
    transfer_ms: float  # from the pull's opening to the confirmed lease
    exposed_ms: float  # from the end of the prefill to the confirmed lease


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the KV of one sequence belongs."""

    memory: PoolMemory
    block_ids: Sequence[int]
    tokens: int  # all of them
    held_tokens: int  # the leading ones that are here already; a multiple of the block size

    def place(self, chunk: KvChunk) -> None:
        """Copy a chunk into its blocks. Raises KvCorrupt if it is not what it says."""
        if chunk.tokens == 0:
            return
        size = self.memory.block_size
        end = chunk.first_token + chunk.tokens
        blocks = self.block_ids[chunk.first_token // size : -(-end // size)]
        if end > self.tokens or len(chunk.payload) != len(blocks) * self.memory.block_bytes:
            raise KvCorrupt(f"a chunk of {chunk.tokens} tokens at {chunk.first_token} has a wrong size")
        self.memory.write(blocks, chunk.payload)


async def receive_kv(
    transport: KvTransport,
    source: KvSource,
    transfer_id: str,
    destination: Destination,
    clock: Clock,
    landed: Callable[[int], None],
) -> Received:
    """Pull, place and confirm. `landed(tokens)` is told how far the KV reaches after every chunk.

    Raises KvSourceLost, KvCorrupt, LeaseExpired or Incompatible; nothing received is valid then, and the
    source is told that it may free the blocks.
    """
    try:
        return await _receive(transport, source, transfer_id, destination, clock, landed)
    except BaseException:
        transport.abandon(source, transfer_id)
        raise


async def _receive(
    transport: KvTransport,
    source: KvSource,
    transfer_id: str,
    destination: Destination,
    clock: Clock,
    landed: Callable[[int], None],
) -> Received:
    started_s = clock.now()
    position = destination.held_tokens
    received_bytes = 0
    last: KvChunk | None = None
    async with aclosing(transport.pull(source, transfer_id, position)) as chunks:
        async for last in chunks:
            if last.first_token != position:
                raise KvCorrupt(f"expected the KV of token {position}, got that of {last.first_token}")
            destination.place(last)
            position += last.tokens
            received_bytes += len(last.payload)
            landed(position)
    arrived_s = clock.now()
    if last is None or last.first is None or position != destination.tokens:
        raise KvSourceLost(f"the transfer ended after {position} of {destination.tokens} tokens")
    if not await transport.release(source, transfer_id):
        raise LeaseExpired(f"the lease of transfer {transfer_id} had ended before the KV was confirmed")
    confirmed_s = clock.now()
    exposed_ms = last.exposed_ms + (confirmed_s - arrived_s) * 1e3
    return Received(last.first, received_bytes, (confirmed_s - started_s) * 1e3, exposed_ms)
