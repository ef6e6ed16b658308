"""The outermost layer of the HTTP side: request ids, arrival times, the door, and the limits of bodies."""

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.core.clock import Clock
from services.core.errors import DiptychError
from services.gateway.api.body import Bodies, Body
from services.gateway.api.http_errors import diptych_error_response, error_response, internal_error_body
from services.gateway.door.door import Door
from services.gateway.door.visits import Visit

REQUEST_ID_HEADER = "X-Request-Id"
_REQUEST_ID_LENGTH_MAX = 128


class Edge:
    """ASGI middleware. Puts into the state:

    - `request_id`: ours, unique; answers and logs are named by it,
    - `client_request_id`: the id that goes back in the header: the client's own, ours if it gave none,
    - `received_at`: when the request came, in seconds of the clock,
    - `visit`: whose it is, and what it uses of the limits.
    """

    def __init__(self, app: ASGIApp, clock: Clock, door: Door, bodies: Bodies) -> None:
        self._app, self._clock, self._door, self._bodies = app, clock, door, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["client_request_id"] = _client_request_id(scope) or request_id
        state["received_at"] = self._clock.now()
        body = self._bodies.open(scope, receive)
        send = _with_headers(send, state, body)
        try:
            visit = self._door.visit(scope["method"], scope["path"], Headers(scope=scope), request_id)
            state["visit"] = visit
            await self._door.enter(visit)
        except DiptychError as error:  # the body stays unread
            await diptych_error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, body.receive, send)
        except Exception:  # a bug, which the framework would answer further out, without our headers
            if "answer_begun" not in state:
                await error_response(500, internal_error_body())(scope, receive, send)
            raise
        finally:
            body.close()
            self._door.leave(visit)


def _with_headers(send: Send, state: dict[str, object], body: Body) -> Send:
    """The request's id, what is left of its key's limits, and whether more is wanted of its body."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            state["answer_begun"] = True
            headers, visit = MutableHeaders(scope=message), state.get("visit")
            headers[REQUEST_ID_HEADER] = str(state["client_request_id"])
            if isinstance(visit, Visit):
                headers.update(visit.headers)
            if body.has_no_end:
                headers["Connection"] = "close"
        await send(message)

    return send_with_headers


def _client_request_id(scope: Scope) -> str | None:
    """The client's own id, if it can go into logs and headers as it is."""
    given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
    fits = 0 < len(given) <= _REQUEST_ID_LENGTH_MAX and given.isascii() and given.isprintable()
    return given if fits else None
