"""One client's connection: uvicorn's, with bounds on what a client can hold without saying anything.

uvicorn waits for the end of a request's head, and of its body, for ever, keeps heads of any length, and
takes any number of connections.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES_MAX = 64 << 10  # of the request line and all headers; browsers and proxies stay below a quarter
HEAD_S, BODY_S = 10.0, 60.0  # the largest body needs 1.1 Mbit/s
CONNECTIONS_MAX = 4096


class Connection(HttpToolsProtocol):
    head_s, body_s, connections_max = HEAD_S, BODY_S, CONNECTIONS_MAX

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._requests = 0
        self._too_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.connections_max:
            self._refuse(503, "The gateway has too many connections")
            return
        self._wait(self.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        requests = self._requests
        super().data_received(data)
        # Counted after parsing: what comes with the end of a head, or of a body, is no part of a head.
        if self._in_head:
            self._head_bytes += len(data) if self._requests == requests else 0
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse(431, f"The request's headers are larger than {HEAD_BYTES_MAX} bytes")
            elif self._too_late is None and self._owes_nothing:
                self._wait(self.head_s)  # even if these are only empty lines before a request

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False
        if self.pipeline:  # it is not read while the one before is answered
            self._stop_waiting()
        else:
            self._wait(self.body_s)

    def on_message_complete(self) -> None:
        self._stop_waiting()
        self._in_head, self._head_bytes = True, 0
        self._requests += 1
        super().on_message_complete()

    @property
    def _owes_nothing(self) -> bool:
        """No request is being answered. While one is, the head of the next may take its time."""
        return self.cycle is None or self.cycle.response_complete

    def _wait(self, seconds: float) -> None:
        """For the client, at most so long."""
        self._stop_waiting()
        self._too_late = self.loop.call_later(
            seconds, self._refuse, 408, f"The request took longer than {seconds:g} s to arrive"
        )

    def _stop_waiting(self) -> None:
        if self._too_late is not None:
            self._too_late.cancel()
            self._too_late = None

    def _refuse(self, status: int, message: str) -> None:
        """Answer, if nothing was answered yet, and close."""
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self._owes_nothing or not self.cycle.response_started:
            self.transport.write(_response(status, message))
        self.transport.close()


def bounded(connections_max: int) -> type[Connection]:
    """For so many connections at the same time."""
    return type("Connection", (Connection,), {"connections_max": connections_max})


def _response(status: int, message: str) -> bytes:
    details = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    body = json.dumps({"error": details}).encode()
    head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body
