"""The outermost layer of the HTTP side: request ids, arrival times, a limit on bodies."""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.core.clock import Clock

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID_LENGTH_MAX = 128


class Edge:
    """ASGI middleware. Puts into the state:

    - `request_id`: ours, unique; answers and logs are named by it,
    - `client_request_id`: the id that goes back in the header: the client's own, ours if it gave none,
    - `received_at`: when the request came, in seconds of the clock.
    """

    def __init__(self, app: ASGIApp, clock: Clock, body_bytes_max: int) -> None:
        self._app, self._clock, self._body_bytes_max = app, clock, body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        client_request_id = _client_request_id(scope) or request_id
        state = scope.setdefault("state", {})
        state["request_id"], state["client_request_id"] = request_id, client_request_id
        state["received_at"] = self._clock.now()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = client_request_id
            await send(message)

        await self._app(scope, self._limited(scope, receive), send_with_id)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        declared = Headers(scope=scope).get("content-length", "0")
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            self._check(int(declared) if declared.isdecimal() else 0)
            message = await receive()
            received += len(message.get("body", b""))
            self._check(received)
            return message

        return receive_limited

    def _check(self, body_bytes: int) -> None:
        if body_bytes > self._body_bytes_max:
            raise HTTPException(413, f"The body is larger than {self._body_bytes_max} bytes")


def _client_request_id(scope: Scope) -> str | None:
    """The client's own id, if it can go into logs and headers as it is."""
    given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    fits = 0 < len(given) <= _REQUEST_ID_LENGTH_MAX and given.isascii() and given.isprintable()
    return given if fits else None
