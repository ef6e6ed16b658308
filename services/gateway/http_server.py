"""The HTTP server of a gateway: uvicorn, with our bounds and certificates."""

import contextlib
import resource
import ssl
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from services.gateway.connection import CONNECTIONS_MAX, bounded

KEEP_ALIVE_S = 75  # idle connections of clients; longer than most proxies keep theirs
_OTHER_FILES = 512  # connections to workers and Redis, the model, logs


class Server(uvicorn.Server):
    """uvicorn's, with signals left to us: its own handling raises them again at the end, which would
    kill the process before the connections to workers and Redis are closed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_config(
    app: ASGIApp,
    tls: ssl.SSLContext | None = None,
    connections_max: int = CONNECTIONS_MAX,
    drain_grace_s: float = 1.0,
) -> uvicorn.Config:
    def context(config: uvicorn.Config, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        assert tls is not None
        return tls

    return uvicorn.Config(
        app,
        port=0,
        http=bounded(connections_max),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(drain_grace_s)),
        ssl_context_factory=context if tls else None,
    )


def allow_connections(connections_max: int) -> int:
    """Have the kernel let us open so many, as far as it does; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections_max + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return connections_max
    return min(connections_max, max(soft - _OTHER_FILES, soft // 2))
