"""KV over NIXL: gRPC says which blocks are ready, one-sided reads bring them.

Whether it is NIXL is the source's choice, pull by pull; else the payloads come inside the messages, as
GrpcKvTransport has them. A NIXL read that fails ends the pull, and the next one asks for gRPC.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from services.core.clock import Clock
from services.core.errors import KvCorrupt, KvLinkLost
from services.transfer.ahead import next_of, until_done
from services.transfer.destination import Destination
from services.transfer.grpc_transport import GrpcKvTransport
from services.transfer.inline import Messages, as_chunk, place_chunks, read_header
from services.transfer.nixl_agent import Range
from services.transfer.nixl_reach import Reach, reach_from_here
from services.transfer.nixl_reader import NixlReader, RemotePool
from services.transfer.protocol import Arrived, KvChunk, KvHeader, KvSource

_AVOID_S = 30.0  # a source whose reads failed is read over gRPC for so long
_REMEMBERED_MAX = 1024  # sources and reasons; more than a cluster has

logger = logging.getLogger(__name__)


class NixlKvTransport:
    """The puller's side. `transports` are those it may use, best first; "nixl" is one of them."""

    def __init__(
        self,
        control: GrpcKvTransport,
        reader: NixlReader,
        transports: Sequence[str],
        clock: Clock,
        reach: Reach | None = None,
    ) -> None:
        self._control = control
        self._reader = reader
        self._transports = transports
        self._without_nixl = [transport for transport in transports if transport != "nixl"]
        self._clock = clock
        self._reach = reach or reach_from_here()
        self._avoided_until_s: dict[KvSource, float] = {}
        self._told: set[tuple[str, str]] = set()  # worker and reason

    async def pull(
        self, source: KvSource, transfer_id: str, destination: Destination, first_token: int
    ) -> AsyncGenerator[Arrived, None]:
        transports = self._without_nixl if self._avoids(source) else self._transports
        messages = self._control.messages(source, transfer_id, first_token, transports, self._reach)
        async with aclosing(messages):
            header = await read_header(messages)
            if header.nixl_pool:
                placing = self._place_by_reads(source, header, messages, destination, first_token)
            else:
                self._tell(source, header.obstacle)
                placing = place_chunks(header, messages, destination, first_token)
            async with aclosing(placing):
                async for arrived in placing:
                    yield arrived

    async def lend(self, source: KvSource, transfer_id: str, token_ids: Sequence[int], salt: str) -> int:
        return await self._control.lend(source, transfer_id, token_ids, salt)

    async def release(self, source: KvSource, transfer_id: str) -> bool:
        return await self._control.release(source, transfer_id)

    def abandon(self, source: KvSource, transfer_id: str) -> None:
        self._control.abandon(source, transfer_id)

    async def close(self) -> None:
        await self._reader.close()
        await self._control.close()

    async def _place_by_reads(
        self,
        source: KvSource,
        header: KvHeader,
        messages: Messages,
        destination: Destination,
        first_token: int,
    ) -> AsyncGenerator[Arrived, None]:
        """While one chunk is read, the next is asked for: that also shows when the source is gone."""
        pool = self._remote_pool(source, header, destination)
        stamped = self._stamped(messages)
        upcoming = next_of(stamped)
        try:
            while (coming := await upcoming) is not None:
                message, came_s = coming
                upcoming = next_of(stamped)
                chunk = as_chunk(message)
                start = min(max(chunk.first_token, first_token), chunk.end)
                ranges = _ranges(chunk, start, destination)
                if ranges:
                    await self._read(source, pool, ranges, upcoming)
                first_token = chunk.end
                travelled = sum(one.bytes for one in ranges)
                # The last chunk, without KV, may have waited for the read of the one before.
                exposed_ms = chunk.exposed_ms + (self._clock.now() - came_s) * 1e3
                yield Arrived(start, chunk.end - start, travelled, False, chunk.firsts, exposed_ms)
        finally:
            upcoming.cancel()
            await until_done(upcoming)

    async def _stamped(self, messages: Messages) -> AsyncGenerator[tuple[KvHeader | KvChunk, float], None]:
        async for message in messages:
            yield message, self._clock.now()

    def _remote_pool(self, source: KvSource, header: KvHeader, destination: Destination) -> RemotePool:
        try:
            if header.block_size != destination.memory.block_size:
                raise KvLinkLost(f"blocks of {header.block_size} tokens cannot be read one-sidedly")
            return msgspec.msgpack.decode(header.nixl_pool, type=RemotePool)
        except (KvLinkLost, msgspec.DecodeError) as error:
            broken = KvLinkLost(f"the source's pool cannot be read: {error}")
            self._avoid(source, broken)
            raise broken from None

    async def _read(
        self,
        source: KvSource,
        pool: RemotePool,
        ranges: Sequence[Range],
        upcoming: "asyncio.Future[Any]",
    ) -> None:
        """Read, unless the next message says that the source is gone. Ends like NixlReader.read."""
        reading = asyncio.create_task(self._reader.read(source.worker_id, pool, ranges))
        try:
            await asyncio.wait((reading, upcoming), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() and (broken := upcoming.exception()):
                raise broken
            await reading
        except KvLinkLost as error:
            if reading.done():
                self._avoid(source, error)
            raise
        finally:
            reading.cancel()
            await until_done(reading)

    def _avoids(self, source: KvSource) -> bool:
        return self._avoided_until_s.get(source, 0.0) > self._clock.now()

    def _avoid(self, source: KvSource, error: KvLinkLost) -> None:
        if self._without_nixl:
            if len(self._avoided_until_s) == _REMEMBERED_MAX:
                self._avoided_until_s.clear()
            self._avoided_until_s[source] = self._clock.now() + _AVOID_S
            message = "KV from %s travels over gRPC for %g s: %s"
            logger.warning(message, source.worker_id, _AVOID_S, error.message)

    def _tell(self, source: KvSource, obstacle: str) -> None:
        """One line per source and reason."""
        if obstacle and (source.worker_id, obstacle) not in self._told:
            if len(self._told) == _REMEMBERED_MAX:
                self._told.clear()
            self._told.add((source.worker_id, obstacle))
            logger.info("KV from %s travels over gRPC, not NIXL: %s", source.worker_id, obstacle)


def merge(pairs: Sequence[tuple[int, int]], block_bytes: int) -> list[Range]:
    """Whole blocks (theirs, ours) as few ranges: those that are neighbours on both sides become one."""
    ranges: list[Range] = []
    for theirs, ours in pairs:
        remote, local = theirs * block_bytes, ours * block_bytes
        if ranges and ranges[-1].remote_end == remote and ranges[-1].local_end == local:
            ranges[-1] = ranges[-1]._replace(bytes=ranges[-1].bytes + block_bytes)
        else:
            ranges.append(Range(remote, local, block_bytes))
    return ranges


def _ranges(chunk: KvChunk, start: int, destination: Destination) -> list[Range]:
    """What to read for the tokens of a chunk from `start` on. Raises KvCorrupt if the chunk does not fit."""
    if start == chunk.end:
        return []
    size = destination.memory.block_size
    if chunk.first_token % size or chunk.end > destination.tokens:
        raise KvCorrupt(f"{chunk} does not fit a sequence of {destination.tokens} tokens")
    first = chunk.first_token // size
    blocks = range(start // size, -(-chunk.end // size))
    try:
        pairs = [(chunk.blocks[block - first], destination.block_ids[block]) for block in blocks]
    except IndexError:
        raise KvCorrupt(f"{chunk} lacks blocks") from None
    return merge(pairs, destination.memory.block_bytes)
