"""A worker's HTTP side: /metrics for Prometheus, /health/live and /health/ready for Kubernetes.

It runs in a thread of its own, so that it answers even when the event loop does not: that is what
`live` tells.
"""

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from services.core.errors import ConfigError

Check = Callable[[], bool]
_POLL_S = 0.1  # how soon close() is noticed


class StatusServer:
    def __init__(self, host: str, port: int, registry: CollectorRegistry, checks: dict[str, Check]) -> None:
        """`checks` maps paths to questions: 200 for yes, 503 for no.

        Raises ConfigError if the port is taken.
        """
        metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                return metrics(environ, start_response)
            if path not in checks:
                return _answer(start_response, "404 Not Found")
            return _answer(start_response, "200 OK" if checks[path]() else "503 Service Unavailable")

        try:
            self._server = make_server(host, port, app, _ThreadingServer, _QuietHandler)
        except OSError as error:
            raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from None
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), daemon=True, name="status"
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    timeout = 5.0  # a client that sends nothing keeps no thread

    def log_message(self, *_: object) -> None:
        """Probes come every few seconds: no line for each."""


def _answer(start_response: Callable[..., Any], status: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain")])
    return [status.encode() + b"\n"]
