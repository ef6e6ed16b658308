"""KV over gRPC: payloads inside the messages, each with its CRC32C. Works over plain TCP everywhere."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from services.core.block_hash import Compatibility
from services.core.errors import (
    DiptychError,
    Draining,
    EngineFailed,
    EngineStalled,
    KvCorrupt,
    KvLinkLost,
    KvSourceLost,
    PeerRefused,
    WorkerLost,
)
from services.transfer.ahead import ahead
from services.transfer.checksum import crc32c
from services.transfer.destination import Destination
from services.transfer.inline import Messages, place_inline
from services.transfer.nixl_reach import Reach
from services.transfer.protocol import Arrived, FirstToken, KvChunk, KvHeader, KvSource, LendOrder, PullOrder
from services.transfer.server import KvServer
from services.wire.channel import TCP, Network, abort, carries_error, from_rpc_error, parsed
from services.wire.convert import (
    compatibility_from_wire,
    compatibility_to_wire,
    finish_from_wire,
    logprobs_from_wire,
    sampled_to_wire,
)
from services.wire.generated import transfer_pb2, transfer_pb2_grpc, worker_pb2
from services.wire.payload_frame import join_payload, split_payload

_SERVICE, _PULL = "diptych.v1.KvTransfer", "Pull"
_serialize = transfer_pb2.PullRequest.SerializeToString
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
        async with self._calling(source) as channel:
            # Not the generated stub: the messages stay bytes until they are split.
            call = channel.unary_stream(f"/{_SERVICE}/{_PULL}", _serialize, bytes)(request)
            try:
                async with aclosing(ahead(_received(call))) as messages:
                    async for message in messages:
                        await asyncio.sleep(0)  # so that gRPC receives the next while this one is placed
                        yield _from_wire(message, source)
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
        async with self._calling(source) as channel:
            reply = await transfer_pb2_grpc.KvTransferStub(channel).Lend(request)
            return int(parsed(reply, source.worker_id).tokens)

    async def release(self, source: KvSource, transfer_id: str) -> bool:
        request = transfer_pb2.ReleaseRequest(transfer_id=transfer_id, epoch=source.epoch)
        async with self._calling(source) as channel:
            stub = transfer_pb2_grpc.KvTransferStub(channel)
            reply = await stub.Release(request, timeout=_RELEASE_DEADLINE_S)
            return bool(parsed(reply, source.worker_id).valid)

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
    async def _calling(self, source: KvSource) -> AsyncIterator[grpc.aio.Channel]:
        """A channel that stays open for the block; its failures become errors of our tree."""
        peer = self._peers.pop(source.address, None) or _Peer(self._network.open_channel(source.address))
        self._peers[source.address] = peer
        peer.calls += 1
        try:
            yield peer.channel
        except grpc.aio.AioRpcError as error:
            raise _source_error(error, source) from None
        except WorkerLost as error:
            raise KvSourceLost(error.message) from None
        finally:
            peer.calls -= 1
            await self._close_idle()

    async def _close_idle(self) -> None:
        """Keep the number of connections bounded; one in use is never closed."""
        idle = [address for address, peer in self._peers.items() if peer.calls == 0]
        surplus = idle[: max(len(self._peers) - _CHANNELS_MAX, 0)]
        # All of them before the first wait, in which others may take or close one.
        for peer in [self._peers.pop(address) for address in surplus]:
            await peer.channel.close()


def serve_kv(kv: KvServer, server: grpc.aio.Server) -> None:
    """Add the service KvTransfer to a gRPC server. As generated code does it, but for the messages of Pull,
    which are bytes already."""
    service = KvTransferService(kv)
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        _PULL: grpc.unary_stream_rpc_method_handler(service.Pull, transfer_pb2.PullRequest.FromString, bytes),
        "Lend": grpc.unary_unary_rpc_method_handler(
            service.Lend, transfer_pb2.LendRequest.FromString, transfer_pb2.LendReply.SerializeToString
        ),
        "Release": grpc.unary_unary_rpc_method_handler(
            service.Release,
            transfer_pb2.ReleaseRequest.FromString,
            transfer_pb2.ReleaseReply.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    server.add_registered_method_handlers(_SERVICE, handlers)


class KvTransferService:
    """The source's side: a KvServer behind gRPC."""

    def __init__(self, server: KvServer) -> None:
        self._server = server

    async def Pull(
        self,
        request: transfer_pb2.PullRequest,
        context: "grpc.aio.ServicerContext[transfer_pb2.PullRequest, bytes]",
    ) -> AsyncIterator[bytes]:
        order = PullOrder(
            transfer_id=request.transfer_id,
            first_token=request.first_token,
            epoch=request.epoch,
            compatibility=compatibility_from_wire(request.compatibility),
            transports=list(request.transports) or ("grpc",),
            reach=Reach(request.reach.machine, request.reach.rdma) if request.HasField("reach") else None,
        )
        try:
            async with (
                aclosing(self._server.pull(order)) as messages,
                aclosing(_as_wire(messages)) as encoded,
                aclosing(ahead(encoded)) as sending,
            ):
                async for message in sending:
                    yield message
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


async def _received(
    call: "grpc.aio.UnaryStreamCall[Any, bytes]",
) -> AsyncGenerator[bytes, None]:
    async for message in call:
        yield message


async def _as_wire(messages: Messages) -> AsyncGenerator[bytes, None]:
    async for message in messages:
        yield _to_wire(message)


def _to_wire(message: KvHeader | KvChunk) -> bytes:
    if isinstance(message, KvHeader):
        header = transfer_pb2.KvHeader(
            block_size=message.block_size, nixl_pool=message.nixl_pool, obstacle=message.obstacle
        )
        return transfer_pb2.KvMessage(header=header).SerializeToString()
    chunk = transfer_pb2.KvChunk(
        first_token=message.first_token,
        tokens=message.tokens,
        blocks=message.blocks,
        crc32c=crc32c(message.payload),
        firsts=[sampled_to_wire(f.index, f.token, f.finish, f.choice, f.logprobs) for f in message.firsts],
        exposed_ms=message.exposed_ms,
    )
    return join_payload(transfer_pb2.KvMessage(chunk=chunk), message.payload)


def _from_wire(data: bytes, source: KvSource) -> KvHeader | KvChunk:
    try:
        message, payload = split_payload(data)
    except DecodeError:
        raise KvCorrupt(f"{source.worker_id} sent what is not a message") from None
    if message.HasField("header"):
        return KvHeader(message.header.block_size, message.header.nixl_pool, message.header.obstacle)
    chunk = message.chunk
    if crc32c(payload) != chunk.crc32c:
        raise KvCorrupt(f"KV from {source.worker_id} failed its checksum at token {chunk.first_token}")
    firsts = tuple(map(_first_from_wire, chunk.firsts))
    return KvChunk(chunk.first_token, chunk.tokens, payload, firsts, chunk.exposed_ms, list(chunk.blocks))


def _first_from_wire(wire: worker_pb2.SampledToken) -> FirstToken:
    return FirstToken(
        wire.index, wire.token, finish_from_wire(wire.finish), wire.choice, logprobs_from_wire(wire)
    )


def _source_error(error: grpc.aio.AioRpcError, source: KvSource) -> DiptychError:
    """What the source said, or that nothing was heard of it."""
    if not carries_error(error):
        return KvLinkLost(from_rpc_error(error, source.worker_id).message)
    known = from_rpc_error(error, source.worker_id)
    # Its own troubles, which must not pass for those of the worker that reports them.
    lost = isinstance(known, WorkerLost | EngineFailed | EngineStalled | Draining | PeerRefused)
    return KvSourceLost(known.message) if lost else known
