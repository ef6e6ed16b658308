"""One generation request as an ASGI response: from the checked body to the last byte.

The client may go at any time. Then everything of the request is cancelled at once, whether the
answer is streamed or not.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.core.child_tasks import ChildTasks
from services.core.errors import DeadlineExceeded, DiptychError, NoWorker
from services.gateway.api.http_errors import diptych_error_response, error_body, internal_error_body
from services.gateway.api.reply import Reply
from services.gateway.api.responses import ErrorBody
from services.gateway.api.sse import EventStream
from services.gateway.door.visits import Visit
from services.gateway.gateway import Gateway
from services.gateway.text.answer import TextDelta

logger = logging.getLogger(__name__)

SEND_GRACE_S = 2.0  # for bytes that are on their way when an answer's time is over


class Exchange(Response):
    def __init__(self, gateway: Gateway, reply: Reply, http: Request) -> None:
        super().__init__()
        self._gateway, self._reply = gateway, reply
        # Ours, not the client's: two requests with one X-Request-Id must not meet on a worker.
        self._request_id: str = http.state.request_id
        self._client_request_id: str = http.state.client_request_id
        self._visit: Visit = http.state.visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises a DiptychError only while no byte of the answer is sent."""
        await while_connected(receive, self._respond(scope, receive, send))

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = EventStream(send)
        try:
            with self._reply.record.keeping(), self._gateway.admission.slot():
                async with self._in_time(), self._answering() as deltas:
                    if self._reply.streamed:
                        await self._reply.stream(deltas, stream)
                    else:
                        content = await self._reply.whole(deltas)
                        await Response(content, media_type="application/json")(scope, receive, send)
        except DiptychError as error:
            if not stream.started:
                raise
            await self._end_with(stream, error_body(error))
        except asyncio.CancelledError:
            if self._gateway.draining:  # the grace period is over; the client must not wonder
                ended = NoWorker("The server is shutting down. Try again in a moment.")
                if stream.started:
                    await self._end_with(stream, error_body(ended))
                else:
                    await diptych_error_response(ended)(scope, receive, send)
            raise
        except Exception:
            if not stream.started:
                raise
            logger.exception("the request failed", extra=self._context)
            await self._end_with(stream, internal_error_body())

    @property
    def _context(self) -> dict[str, str | None]:
        """For the log."""
        return {"request_id": self._request_id, "key": self._visit.tenant.name or None}

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        """Also a client that stops reading must not hold its place for ever."""
        try:
            async with asyncio.timeout(self._gateway.config.request_timeout_s + SEND_GRACE_S):
                yield
        except TimeoutError:
            raise DeadlineExceeded("The client did not read its answer in time.") from None

    @asynccontextmanager
    async def _answering(self) -> AsyncIterator[AsyncGenerator[list[TextDelta], None]]:
        deadline = self._gateway.clock.now() + self._gateway.config.request_timeout_s
        generations = await self._reply.read(self._request_id, deadline, self._visit.tenant)
        await self._visit.take_prompt(sum(len(generation.prompt_ids) for generation in generations))
        self._visit.count_answer(lambda: self._reply.record.completion_tokens)
        async with self._gateway.answering(generations, self._reply.record) as deltas:
            logger.debug("admitted the client's request %s", self._client_request_id, extra=self._context)
            yield deltas

    async def _end_with(self, stream: EventStream, error: ErrorBody) -> None:
        """An error after the first byte: the status is gone, so it is an event."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SEND_GRACE_S):
                await self._reply.break_off(error, stream)
                await stream.end()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, or cancel it when the client goes."""
    async with ChildTasks() as tasks:
        working, leaving = tasks.start(work), tasks.start(_disconnect(receive))
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()  # raises what it raised


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
