"""KV over gRPC: payloads inside the messages, each with its CRC32C. Works over plain TCP everywhere."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass

import google_crc32c
import grpc.aio

from services.core.block_hash import Compatibility
from services.core.errors import (
    DiptychError,
    Draining,
    EngineFailed,
    EngineStalled,
    KvCorrupt,
    KvLinkLost,
    KvSourceLost,
    WorkerLost,
)
from services.transfer.destination import Destination
from services.transfer.inline import place_inline
from services.transfer.nixl_reach import Reach
from services.transfer.protocol import Arrived, FirstToken, KvChunk, KvHeader, KvSource, LendOrder, PullOrder
from services.transfer.server import KvServer
from services.wire.channel import TCP, Network, abort, carries_error, from_rpc_error
from services.wire.convert import (
    compatibility_from_wire,
    compatibility_to_wire,
    finish_from_wire,
    sampled_to_wire,
)
from services.wire.generated import transfer_pb2, transfer_pb2_grpc

_RELEASE_DEADLINE_S = 1.0
_CHANNELS_MAX = 256  # workers this one has pulled from; idle connections beyond that are closed


@dataclass(slots=True)
class _Peer:
    channel: grpc.aio.Channel
    calls: int = 0


class GrpcKvTransport:
    """The puller's side."""

    def __init__(self, compatibility: Compatibility, network: Network = TCP) -> None:
        self._network = network
        self._compatibility = compatibility_to_wire(compatibility)
        self._peers: dict[str, _Peer] = {}  # by address, the least recently used first
        self._abandoning: set[asyncio.Task[None]] = set()

    async def pull(
        self, source: KvSource, transfer_id: str, destination: Destination, first_token: int
    ) -> AsyncGenerator[Arrived, None]:
        messages = self.messages(source, transfer_id, first_token)
        async with aclosing(place_inline(messages, destination, first_token)) as arriving:
            async for arrived in arriving:
                yield arrived

    async def messages(
        self,
        source: KvSource,
        transfer_id: str,
        first_token: int,
        transports: Sequence[str] = ("grpc",),
        reach: Reach | None = None,
    ) -> AsyncGenerator[KvHeader | KvChunk, None]:
        """What the source sends to a reader that has these transports. Payloads' checksums held."""
        request = transfer_pb2.PullRequest(
            transfer_id=transfer_id,
            first_token=first_token,
            epoch=source.epoch,
            compatibility=self._compatibility,
            transports=transports,
            reach=transfer_pb2.Reach(machine=reach.machine, rdma=reach.rdma) if reach else None,
        )
        async with self._calling(source) as stub:
            call = stub.Pull(request)
            try:
                async for message in call:
                    yield _message_from_wire(message, source)
            finally:
                call.cancel()

    async def lend(self, source: KvSource, transfer_id: str, token_ids: Sequence[int], salt: str) -> int:
        request = transfer_pb2.LendRequest(
            transfer_id=transfer_id,
            token_ids=token_ids,
            salt=salt,
            epoch=source.epoch,
            compatibility=self._compatibility,
        )
        async with self._calling(source) as stub:
            reply = await stub.Lend(request)
            return int(reply.tokens)

    async def release(self, source: KvSource, transfer_id: str) -> bool:
        request = transfer_pb2.ReleaseRequest(transfer_id=transfer_id, epoch=source.epoch)
        async with self._calling(source) as stub:
            reply = await stub.Release(request, timeout=_RELEASE_DEADLINE_S)
            return bool(reply.valid)

    def abandon(self, source: KvSource, transfer_id: str) -> None:
        task = asyncio.create_task(self._try_release(source, transfer_id))
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)

    async def _try_release(self, source: KvSource, transfer_id: str) -> None:
        with suppress(DiptychError):
            await self.release(source, transfer_id)

    async def close(self) -> None:
        for task in self._abandoning:
            task.cancel()
        if self._abandoning:
            await asyncio.wait(self._abandoning)
        for peer in self._peers.values():
            await peer.channel.close()

    @asynccontextmanager
    async def _calling(self, source: KvSource) -> AsyncIterator["transfer_pb2_grpc.KvTransferStub"]:
        """A stub whose channel stays open for the block; its failures become errors of our tree."""
        peer = self._peers.pop(source.address, None) or _Peer(self._network.open_channel(source.address))
        self._peers[source.address] = peer
        peer.calls += 1
        try:
            yield transfer_pb2_grpc.KvTransferStub(peer.channel)
        except grpc.aio.AioRpcError as error:
            raise _source_error(error, source) from None
        finally:
            peer.calls -= 1
            await self._close_idle()

    async def _close_idle(self) -> None:
        """Keep the number of connections bounded; one in use is never closed."""
        idle = [address for address, peer in self._peers.items() if peer.calls == 0]
        for address in idle[: max(len(self._peers) - _CHANNELS_MAX, 0)]:
            await self._peers.pop(address).channel.close()


class KvTransferService(transfer_pb2_grpc.KvTransferServicer):
    """The source's side: a KvServer behind gRPC."""

    def __init__(self, server: KvServer) -> None:
        self._server = server

    async def Pull(
        self,
        request: transfer_pb2.PullRequest,
        context: "grpc.aio.ServicerContext[transfer_pb2.PullRequest, transfer_pb2.KvMessage]",
    ) -> AsyncIterator[transfer_pb2.KvMessage]:
        order = PullOrder(
            transfer_id=request.transfer_id,
            first_token=request.first_token,
            epoch=request.epoch,
            compatibility=compatibility_from_wire(request.compatibility),
            transports=list(request.transports) or ("grpc",),
            reach=Reach(request.reach.machine, request.reach.rdma) if request.HasField("reach") else None,
        )
        try:
            async with aclosing(self._server.pull(order)) as messages:
                async for message in messages:
                    yield _message_to_wire(message)
        except DiptychError as error:
            await abort(context, error)

    async def Lend(
        self,
        request: transfer_pb2.LendRequest,
        context: "grpc.aio.ServicerContext[transfer_pb2.LendRequest, transfer_pb2.LendReply]",
    ) -> transfer_pb2.LendReply:
        order = LendOrder(
            transfer_id=request.transfer_id,
            token_ids=list(request.token_ids),
            salt=request.salt,
            epoch=request.epoch,
            compatibility=compatibility_from_wire(request.compatibility),
        )
        try:
            return transfer_pb2.LendReply(tokens=await self._server.lend(order))
        except DiptychError as error:
            await abort(context, error)

    async def Release(
        self,
        request: transfer_pb2.ReleaseRequest,
        context: "grpc.aio.ServicerContext[transfer_pb2.ReleaseRequest, transfer_pb2.ReleaseReply]",
    ) -> transfer_pb2.ReleaseReply:
        return transfer_pb2.ReleaseReply(valid=self._server.release(request.transfer_id, request.epoch))


def _message_to_wire(message: KvHeader | KvChunk) -> transfer_pb2.KvMessage:
    if isinstance(message, KvHeader):
        header = transfer_pb2.KvHeader(
            block_size=message.block_size, nixl_pool=message.nixl_pool, obstacle=message.obstacle
        )
        return transfer_pb2.KvMessage(header=header)
    return transfer_pb2.KvMessage(chunk=_chunk_to_wire(message))


def _message_from_wire(message: transfer_pb2.KvMessage, source: KvSource) -> KvHeader | KvChunk:
    if message.HasField("header"):
        return KvHeader(message.header.block_size, message.header.nixl_pool, message.header.obstacle)
    return _chunk_from_wire(message.chunk, source)


def _chunk_to_wire(chunk: KvChunk) -> transfer_pb2.KvChunk:
    return transfer_pb2.KvChunk(
        first_token=chunk.first_token,
        tokens=chunk.tokens,
        payload=chunk.payload,
        blocks=chunk.blocks,
        crc32c=google_crc32c.value(chunk.payload),
        firsts=[sampled_to_wire(f.index, f.token, f.finish, f.choice) for f in chunk.firsts],
        exposed_ms=chunk.exposed_ms,
    )


def _chunk_from_wire(message: transfer_pb2.KvChunk, source: KvSource) -> KvChunk:
    payload = message.payload
    if google_crc32c.value(payload) != message.crc32c:
        raise KvCorrupt(f"KV from {source.worker_id} failed its checksum at token {message.first_token}")
    firsts = tuple(FirstToken(f.index, f.token, finish_from_wire(f.finish), f.choice) for f in message.firsts)
    blocks = list(message.blocks)
    return KvChunk(message.first_token, message.tokens, payload, firsts, message.exposed_ms, blocks)


def _source_error(error: grpc.aio.AioRpcError, source: KvSource) -> DiptychError:
    """What the source said, or that nothing was heard of it."""
    if not carries_error(error):
        return KvLinkLost(from_rpc_error(error, source.worker_id).message)
    known = from_rpc_error(error, source.worker_id)
    # Its own troubles, which must not pass for those of the worker that reports them.
    lost = isinstance(known, WorkerLost | EngineFailed | EngineStalled | Draining)
    return KvSourceLost(known.message) if lost else known
