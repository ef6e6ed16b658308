"""The source's side of a transfer, free of any transport: streams a lease's KV as it grows, and opens the
lease itself where a reader asks for a cached prefix."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

from services.core.block_hash import Compatibility
from services.core.clock import Clock
from services.core.errors import BadRequest, DiptychError, Incompatible, KvSourceLost, KvStale
from services.transfer.lease import Lease, LeaseTable
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import KvChunk, KvHeader, LendOrder, NixlOffer, PullOrder, is_loan_id
from services.wire.convert import check_name

# A message over gRPC. Measured per block of 737 kB, processor time of both sides together: 0.71 ms at
# 1 MiB, 0.66 at 2, 0.60 at 4, 0.63 at 8 MiB.
CHUNK_BYTES = 4 << 20
# What a reader reads at once: 20 ms at 3 GB/s, so that others get their turn and a cancelled one ends.
REFERENCE_BYTES = 64 << 20


class KvServer:
    def __init__(
        self,
        leases: LeaseTable,
        memory: PoolMemory,
        compatibility: Compatibility,
        is_current: Callable[[int], bool],
        clock: Clock,
        pull_wait_s: float,
        lend_cached: Callable[[Lease, Sequence[int], str], None],
        on_sent: Callable[[int], None] = lambda sent_bytes: None,
        nixl: NixlOffer | None = None,
    ) -> None:
        """`is_current` tells whether an epoch is that of this worker now. `lend_cached(lease, token_ids,
        salt)` has the engine keep what it has cached of the tokens: the lease is `lent` or fails before
        long. It may raise Overloaded, EngineFailed or EngineStalled."""
        self._leases = leases
        self._memory = memory
        self._compatibility = compatibility
        self._is_current = is_current
        self._clock = clock
        self._pull_wait_s = pull_wait_s
        self._lend_cached = lend_cached
        self._on_sent = on_sent
        self._nixl = nixl
        self._blocks_per_chunk = max(CHUNK_BYTES // memory.block_bytes, 1)
        self._blocks_per_reference = max(REFERENCE_BYTES // memory.block_bytes, 1)

    async def pull(self, order: PullOrder) -> AsyncGenerator[KvHeader | KvChunk, None]:
        """Whole blocks as soon as they are computed, the partial one with the end of the prefill.

        The first is the one with the token asked for; the reader knows what of it it has already.
        """
        self._check(order.epoch, order.compatibility)
        check_name(order.transfer_id, "transfer_id")
        lease = await self._leases.find(order.transfer_id, self._pull_wait_s)
        with self._leases.hold(lease):
            lease.opened_by_puller()
            header = self._header(order)
            yield header
            position = order.first_token // self._memory.block_size * self._memory.block_size
            while not lease.complete or position < lease.tokens:
                await self._more_than(position, lease)
                for chunk in self._chunks(lease, position, self._readable(lease), bool(header.nixl_pool)):
                    if lease.error:  # the prefill was cancelled while the last chunk was on its way
                        raise lease.error
                    yield chunk
                    position += chunk.tokens
                    self._on_sent(len(chunk.payload) + len(chunk.blocks) * self._memory.block_bytes)
            exposed_ms = (self._clock.now() - lease.complete_at_s) * 1e3
            yield KvChunk(position, 0, b"", tuple(lease.firsts), exposed_ms)

    async def lend(self, order: LendOrder) -> int:
        """Open a loan; of how many leading tokens. What a draining worker has cached may be read, too."""
        self._check(order.epoch, order.compatibility)
        check_name(order.transfer_id, "transfer_id")
        check_name(order.salt or "-", "salt")
        if not is_loan_id(order.transfer_id):
            raise BadRequest(f"{order.transfer_id} does not name a loan", "transfer_id")
        if len(order.token_ids) > self._memory.geometry.blocks * self._memory.block_size:
            raise BadRequest("token_ids are more than a cache holds", "token_ids")
        if self._leases.knows(order.transfer_id):
            raise BadRequest(f"transfer {order.transfer_id} is open already", "transfer_id")
        lease = self._leases.open_loan(order.transfer_id)
        try:
            with self._leases.hold(lease):
                self._lend_cached(lease, order.token_ids, order.salt)
                await lease.until(lambda: lease.complete)
        except DiptychError as error:
            self._leases.fail(lease, error)
            raise
        except asyncio.CancelledError:
            self._leases.fail(lease, KvSourceLost("the reader of a prefix has gone"))
            raise
        return lease.tokens

    def release(self, transfer_id: str, epoch: int) -> bool:
        return self._is_current(epoch) and self._leases.release(transfer_id)

    def _check(self, epoch: int, theirs: Compatibility) -> None:
        if not self._is_current(epoch):
            raise KvSourceLost("the source has restarted since the request was routed")
        if differences := self._compatibility.differences(theirs):
            raise Incompatible("source and reader differ in " + "; ".join(differences))

    def _header(self, order: PullOrder) -> KvHeader:
        """Says how the KV travels: the first way of the reader's that is possible here.

        Raises Incompatible if there is none.
        """
        obstacle = ""
        for transport in order.transports:
            if transport == "grpc":
                return KvHeader(self._memory.block_size, obstacle=obstacle)
            if transport == "nixl":
                obstacle = self._nixl.obstacle(order) if self._nixl else "the source does not have it"
                if self._nixl and not obstacle:
                    return KvHeader(self._memory.block_size, nixl_pool=self._nixl.pool)
        reason = f"; nixl: {obstacle}" if obstacle else ""
        raise Incompatible(f"KV cannot travel over any of {', '.join(order.transports)}{reason}")

    async def _more_than(self, position: int, lease: Lease) -> None:
        """Wait for KV beyond `position`, or for the prefill's end."""
        await lease.until(lambda: lease.complete or self._readable(lease) > position)

    def _readable(self, lease: Lease) -> int:
        """Tokens whose KV may travel: whole blocks, and the last partial one when all is computed."""
        if lease.complete:
            return lease.tokens
        return lease.computed // self._memory.block_size * self._memory.block_size

    def _chunks(self, lease: Lease, start: int, end: int, by_reference: bool) -> Iterator[KvChunk]:
        """Reads lazily: a block is copied when its chunk is about to be sent."""
        size = self._memory.block_size
        step = (self._blocks_per_reference if by_reference else self._blocks_per_chunk) * size
        for position in range(start, end, step):
            stop = min(position + step, end)
            blocks = slice(position // size, -(-stop // size))
            ids = lease.block_ids[blocks]
            payload = b"" if by_reference else self._memory.read(ids)
            self._check_unchanged(lease, blocks)
            yield KvChunk(position, stop - position, payload, blocks=ids if by_reference else ())

    def _check_unchanged(self, lease: Lease, blocks: slice) -> None:
        """After the copy: the blocks were the lease's all the time. The lease sees to that; should it
        fail to, nobody may decode from what was read."""
        if not lease.unchanged(blocks):
            self._leases.end_stale(lease)
            raise KvStale(f"a KV block was reused while transfer {lease.transfer_id} read it")
