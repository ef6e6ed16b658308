"""gRPC channels, servers and errors, set up the same way everywhere. Who may speak to whom is decided by the
Network that cluster_lock.py makes of this one.

An error of our tree crosses the wire as its gRPC code plus the trailing metadata `diptych-error`
(its label); `from_rpc_error` turns it back, and any other failure of a call into a WorkerLost (or a
PeerRefused, if it was the peer's certificate).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

from services.core.errors import ConfigError, DiptychError, PeerRefused, WorkerLost, facts, from_label

T = TypeVar("T")

ERROR_LABEL_KEY = "diptych-error"
MESSAGE_BYTES_MAX = 64 << 20  # KV: one block of a 400-layer float32 model is far below
# What a server takes: a million token ids of up to five bytes each, and a grammar.
REQUEST_BYTES_MAX = 16 << 20
# Of one connection, and of a server: a worker has at most a Run and a Pull for each of its sequences and a
# few streams besides. More calls on a connection wait at their caller, more at a server are refused.
STREAMS_MAX, CALLS_MAX = 1024, 4096

_MESSAGE_CHARACTERS_MAX = 1000  # of an error: it travels in a header, of which peers take 8 KiB

# Keepalive finds a peer that stopped answering within 2 s even when no call makes progress. Its pings
# have a timeout of their own, 60 s by default, without which the other one means nothing.
_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 1_000),
    ("grpc.http2.ping_timeout_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener
]
_SERVER_OPTIONS = [
    *_OPTIONS,
    ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
    ("grpc.max_concurrent_streams", STREAMS_MAX),
    ("grpc.server_handshake_timeout_ms", 5_000),  # a stranger who says nothing; the default is two minutes
]
# A restarted worker must be reachable within a moment, not after the default two minutes.
_CHANNEL_OPTIONS = [
    *_OPTIONS,
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # It also bounds one attempt to connect, which calls wait for: a stopped process accepts connections
    # and says nothing. The default is 20 s.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),  # channels to one address do not share a connection's fate
]


def channel_options() -> list[tuple[str, int | str]]:
    return [*_CHANNEL_OPTIONS]


def open_channel(address: str) -> grpc.aio.Channel:
    """A lazy connection to host:port."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def new_server(interceptors: Sequence[grpc.aio.ServerInterceptor] = ()) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=interceptors, options=_SERVER_OPTIONS, maximum_concurrent_rpcs=CALLS_MAX
    )


def listen(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None = None
) -> int:
    """Bind `server`; the port, also when 0 asked for a free one. Raises ConfigError if it is taken."""
    address = f"{host}:{port}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        raise ConfigError(f"cannot listen on {address}: is the port in use?") from None


@dataclass(frozen=True, slots=True)
class Network:
    """Where servers listen and channels lead: TCP, or another one that behaves like it."""

    open_channel: Callable[[str], grpc.aio.Channel] = open_channel
    new_server: Callable[[], grpc.aio.Server] = new_server
    listen: Callable[[grpc.aio.Server, str, int], int] = listen
    direct: bool = False  # what else machines can do with each other, they can: NIXL would not go past it


TCP = Network(direct=True)


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: DiptychError) -> NoReturn:
    """End the call with `error`."""
    known = facts(error)
    await context.abort(
        getattr(grpc.StatusCode, known.grpc_code),
        error.message[:_MESSAGE_CHARACTERS_MAX],
        trailing_metadata=((ERROR_LABEL_KEY, known.label),),
    )
    raise AssertionError("abort returned")


def parsed(reply: T | None, peer: str) -> T:
    """The reply of a call; of one that is no message gRPC makes None, with a line in the log.

    Raises WorkerLost.
    """
    if reply is None:
        raise WorkerLost(f"{peer} sent what is not a message")
    return reply


def carries_error(error: grpc.aio.AioRpcError) -> bool:
    """Whether the peer itself ended the call, with an error of our tree; else the call broke."""
    return any(key == ERROR_LABEL_KEY for key, _ in error.trailing_metadata() or ())


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str) -> DiptychError:
    """The error of our tree that a failed call to `peer` carries."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_LABEL_KEY:
            return from_label(str(value), error.details() or "")
    said = f"{peer}: {error.code().name}: {error.details()}"
    return PeerRefused(said) if _is_mistrust(error) else WorkerLost(said)


def _is_mistrust(error: grpc.aio.AioRpcError) -> bool:
    """Whether we do not trust the peer's certificate. That it does not trust ours looks like a connection
    that closes; its log says why."""
    details = (error.details() or "").lower()
    return "handshake failed" in details or "verification check failed" in details
