"""One RPC between two simulated processes, both sides of it, and what a stub of grpc.aio gives for it.

    client ── OPEN, messages, END or CANCEL ──> server ── messages, Status ──> client

Per direction messages keep their order and at most WINDOW of them are unread; every message takes the
link's delay. What breaks, breaks as gRPC shows it: the client sees AioRpcError or a cancellation, the
server's handler is cancelled.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from services.wire.generated import transfer_pb2
from tests.sim.loop import Process

if TYPE_CHECKING:
    from tests.sim.network import SimNetwork

WINDOW = 3  # messages; real windows are bytes, and about as many messages of the size of a KV chunk
CONNECT_S = 1.0  # services/wire/channel.py, for a peer whose kernel accepts and whose process is silent
_OPEN, _END, _CANCEL = object(), object(), object()


@dataclass(frozen=True, slots=True)
class Status:
    code: grpc.StatusCode
    details: str = ""
    trailing: tuple[tuple[str, str], ...] = ()

    def error(self) -> grpc.aio.AioRpcError:
        metadata = grpc.aio.Metadata()
        return grpc.aio.AioRpcError(self.code, metadata, grpc.aio.Metadata(*self.trailing), self.details)


class _Stream:
    """One direction of a call."""

    def __init__(self, call: "SimCall", sender: Process, receiver: Process, on_item: Callable[[Any], None]):
        self._call, self._sender, self._receiver, self._on_item = call, sender, receiver, on_item
        self._in_flight: deque[Any] = deque()
        self._arrived: deque[Any] = deque()
        self._changed = asyncio.Event()

    def push(self, item: object) -> None:
        """Send, window or not. A dead process sends nothing."""
        if not self._sender.dead:
            self._in_flight.append(item)
            self._call.network.deliver(self._call.link, self._receiver, self._arrive)

    async def send(self, message: bytes, over: Callable[[], bool]) -> None:
        """Send when there is room in the window; returns without sending once the call is over."""
        while len(self._in_flight) + len(self._arrived) >= WINDOW and not over():
            await self._changed.wait()
        if not over():
            self.push(message)

    def keep(self, item: object) -> None:
        self._arrived.append(item)
        self.wake()

    async def receive(self, over: Callable[[], bool]) -> Any:
        """The next item; None once the call is over."""
        while not over():
            if self._arrived:
                item = self._arrived.popleft()
                self.wake()
                return item
            await self._changed.wait()
        return None

    def wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _arrive(self) -> None:
        """Deliveries may overtake each other; each brings the oldest item."""
        self._on_item(self._in_flight.popleft())


class SimCall:
    """One RPC, both sides of it."""

    def __init__(
        self,
        network: "SimNetwork",
        client: Process,
        address: str,
        path: str,
        deserialize: Callable[[bytes], Any],
    ) -> None:
        self.network, self.client, self.path = network, client, path
        network.calls_opened += 1
        self.number = network.calls_opened
        self._deserialize = deserialize
        self.name = path.rsplit("/", 1)[1]
        self.host = address.rsplit(":", 1)[0]
        self.link = network.link(client.name, self.host)
        self.status: Status | None = None  # as the client knows it
        self.cancelled = False  # by the client
        self.handler: asyncio.Task[None] | None = None
        self._server_over = False
        self._refused = asyncio.Event()  # or given up, if it does not connect
        self._server = network.servers.get(address)
        self.process = self._server.process if self._server else None
        network.calls[self] = None
        self._note("opens")
        if self._server is None or self.link.cut or client.dead:
            self._server_over = True
            client.call_later(network.rng.uniform(0.0005, 0.1), self._lose, "connection refused")
            return
        assert self.process is not None
        self.requests = _Stream(self, client, self.process, self._arrive_at_server)
        self.replies = _Stream(self, self.process, client, self._arrive_at_client)
        self.requests.push(_OPEN)
        if self.process.stopped or self.link.silent:
            client.call_later(CONNECT_S, self._give_up_connecting)

    @property
    def client_over(self) -> bool:
        return self.cancelled or self.status is not None

    # The client's side

    async def write(self, message: bytes) -> None:
        self._raise_if_over()
        if self.connects:
            await self._or_cancel(self.requests.send(message, lambda: self.client_over))
        self._raise_if_over()

    def end_requests(self) -> None:
        if self.connects:
            self.requests.push(_END)

    async def read(self) -> bytes | None:
        """The next reply; None after the last one. Raises AioRpcError; CancelledError if it was cancelled."""
        item = None
        if self.connects:
            item = await self._or_cancel(self.replies.receive(lambda: self.client_over))
        else:
            await self._or_cancel(self._refused.wait())
        if isinstance(item, Status):
            self.status = item
            self._settle()
        if self.cancelled:
            raise asyncio.CancelledError
        if self.status is not None and self.status.code is not grpc.StatusCode.OK:
            raise self.status.error()
        return item if isinstance(item, bytes) else None

    def cancel(self) -> bool:
        if self.client_over:
            return False
        self.cancelled = True
        self._note("is cancelled")
        if self.connects:
            self.requests.push(_CANCEL)
            self.requests.wake()
            self.replies.wake()
        self._refused.set()
        self._settle()
        return True

    def expire(self) -> None:
        """The client's deadline is over."""
        if not self.client_over:
            self.cancel()
            self.cancelled = False
            self.status = Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def break_off(self, why: str) -> None:
        """The connection is gone; each side notices by itself."""
        self._note(why)
        self.client.call_later(0.0, self._lose, why)
        if self.process is not None:
            self.process.call_later(0.0, self._lose_client)

    # The server's side

    def _arrive_at_server(self, item: object) -> None:
        if item is _OPEN:
            self._accept()
        elif item is _CANCEL:
            self._lose_client()
        elif not self._server_over:
            self.requests.keep(item)

    def _accept(self) -> None:
        assert self._server is not None
        assert self.process is not None
        if self._server.closed or self._server_over:
            self._server_over = True
            self.network.deliver(self.link, self.client, partial(self._lose, "the server is shutting down"))
            return
        method = self._server.methods.get(self.path)
        if method is None:
            self._end_server(Status(grpc.StatusCode.UNIMPLEMENTED, f"no method {self.path}"))
            return
        self._note("is accepted")
        self._server.calls[self] = None
        self.handler = self.process.start(self._handle(method))

    async def _handle(self, method: "grpc.RpcMethodHandler") -> None:
        context = _ServicerContext()
        try:
            await self._respond(method, context)
            status = Status(grpc.StatusCode.OK)
        except _Aborted:
            status = context.status
        except asyncio.CancelledError:
            self._end_server(Status(grpc.StatusCode.CANCELLED, "the handler was cancelled"))
            raise
        except Exception as error:
            self.network.on_bug(f"{self.host}: {self.name} raised {error!r}")
            status = Status(grpc.StatusCode.UNKNOWN, repr(error))
        self._end_server(status)

    async def _respond(self, method: "grpc.RpcMethodHandler", context: "_ServicerContext") -> None:
        if method.request_streaming:
            request: Any = self._requests(method)
        else:
            raw = await self.requests.receive(lambda: self._server_over)
            if not isinstance(raw, bytes):
                return
            request = method.request_deserializer(raw)
        behavior = method.unary_unary or method.unary_stream or method.stream_unary or method.stream_stream
        if not method.response_streaming:
            reply = await behavior(request, context)
            await self.replies.send(method.response_serializer(reply), lambda: self._server_over)
            return
        # Like gRPC, this leaves a generator whose sending is cancelled to Python's finalizer.
        async for reply in behavior(request, context):
            await self.replies.send(method.response_serializer(reply), lambda: self._server_over)

    async def _requests(self, method: "grpc.RpcMethodHandler") -> AsyncIterator[Any]:
        while True:
            item = await self.requests.receive(lambda: self._server_over)
            if not isinstance(item, bytes):
                return
            yield method.request_deserializer(item)

    def _end_server(self, status: Status) -> None:
        if not self._server_over:
            self._server_over = True
            self._note(f"ends with {status.code.name} {status.details}")
            self.replies.push(status)
            self.requests.wake()
        if self._server is not None:
            self._server.calls.pop(self, None)
        self._settle()

    def _lose_client(self) -> None:
        """The client is gone, or has given up."""
        if not self._server_over:
            self._server_over = True
            self.requests.wake()
            self.replies.wake()
            if self.handler is not None:
                self.handler.cancel()
            self._settle()

    def cut_by_server(self) -> None:
        """The server stops without waiting for its calls."""
        self._lose_client()
        self.network.deliver(self.link, self.client, partial(self._lose, "the server is shutting down"))

    # Both

    def _note(self, what: str) -> None:
        self.network.trace.note(self.client.name, f"{self.name} {self.number} on {self.host}: {what}")

    @property
    def connects(self) -> bool:
        return self.process is not None and hasattr(self, "requests")

    def _arrive_at_client(self, item: object) -> None:
        if self.client_over:
            return
        if isinstance(item, bytes) and self.name == "Pull":
            self.network.on_pull()
            item = self._flipped(item) if self.link.flips else item
        if isinstance(item, bytes):
            item = self.network.tamper(self, item)
        if item is not None:
            self.replies.keep(item)

    def _flipped(self, message: bytes) -> bytes:
        """With one byte of its KV changed, if it carries any."""
        payload = _longest_bytes(self._deserialize(message))
        if not payload:
            return message
        self.link.flips -= 1
        self.network.flipped += 1
        self.network.trace.note(self.host, f"a byte flips on the way to {self.client.name}")
        position = message.index(payload) + self.network.rng.randrange(len(payload))
        return message[:position] + bytes([message[position] ^ 0x40]) + message[position + 1 :]

    def _lose(self, why: str) -> None:
        if not self.client_over:
            self.status = Status(grpc.StatusCode.UNAVAILABLE, why)
            if self.connects:
                self.requests.wake()
                self.replies.wake()
            self._refused.set()
            self._settle()

    def _give_up_connecting(self) -> None:
        if self.handler is None and self in self.network.calls:
            self._server_over = True  # what was never connected does not arrive later
            self._lose("connect timeout")
            self._settle()

    async def _or_cancel(self, waiting: Any) -> Any:
        """A client whose task is cancelled cancels its call, as gRPC's own calls do."""
        try:
            return await waiting
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _raise_if_over(self) -> None:
        if self.cancelled:
            raise asyncio.InvalidStateError("RPC already finished.")
        if self.status is not None:
            raise self.status.error()

    def _settle(self) -> None:
        if self.client_over and self._server_over:
            self.network.calls.pop(self, None)


def _longest_bytes(message: Any) -> bytes:
    """The longest value of type bytes in a protobuf message: the payload, if it carries KV."""
    if isinstance(message, bytes):  # a pull's reader takes its messages as they come
        message = transfer_pb2.KvMessage.FromString(message)
    longest = b""
    for _, value in message.ListFields():
        if isinstance(value, bytes):
            longest = max(longest, value, key=len)
        elif hasattr(value, "ListFields"):
            longest = max(longest, _longest_bytes(value), key=len)
    return longest


class _Aborted(Exception):
    pass


class _ServicerContext:
    def __init__(self) -> None:
        self.status = Status(grpc.StatusCode.OK)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        self.status = Status(code, details, tuple(trailing_metadata))
        raise _Aborted(details)


class ClientCall:
    """What the stubs of grpc.aio give."""

    def __init__(self, call: SimCall, serialize: Any, deserialize: Any) -> None:
        self._call, self._serialize, self._deserialize = call, serialize, deserialize

    def cancel(self) -> bool:
        return self._call.cancel()

    def cancelled(self) -> bool:
        return self._call.cancelled

    def done(self) -> bool:
        return self._call.client_over

    async def write(self, message: Any) -> None:
        await self._call.write(self._serialize(message))

    async def done_writing(self) -> None:
        self._call.end_requests()

    async def read(self) -> Any:
        raw = await self._call.read()
        return grpc.aio.EOF if raw is None else self._deserialize(raw)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (raw := await self._call.read()) is not None:
            yield self._deserialize(raw)

    def __await__(self) -> Any:
        return self._single().__await__()

    async def _single(self) -> Any:
        raw = await self._call.read()
        assert raw is not None, "a unary call ended without a reply"
        await self._call.read()  # its status
        return self._deserialize(raw)
