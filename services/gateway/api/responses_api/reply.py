"""One answer of the Responses API, whole or as typed events, over the same path as a chat."""

import time
from collections.abc import Iterable
from typing import Any

import msgspec

from services.core.errors import BadRequest
from services.gateway.api.fields import check_fields
from services.gateway.api.reply import Deltas
from services.gateway.api.responses import ErrorBody
from services.gateway.api.responses_api.as_chat import as_chat, in_own_terms
from services.gateway.api.responses_api.kept import KeptResponses
from services.gateway.api.responses_api.output import Event, Output
from services.gateway.api.responses_api.request import Item, ResponsesRequest
from services.gateway.api.responses_api.response import (
    IncompleteDetails,
    InputTokensDetails,
    ResponseFailure,
    ResponseObject,
    ResponseUsage,
    Status,
)
from services.gateway.api.sse import EventStream
from services.gateway.door.tenant import ANYBODY, Tenant
from services.gateway.path.generation import Generation
from services.gateway.path.record import Record
from services.gateway.text.prompt import PromptReader
from services.gateway.text.tool_calls.call_delta import AnswerEnd


class ResponseReply:
    def __init__(
        self,
        body: ResponsesRequest,
        prompts: PromptReader,
        kept: KeptResponses,
        record: Record,
        request_id: str,
    ) -> None:
        self._body, self._prompts, self._kept, self.record = body, prompts, kept, record
        self.streamed = body.stream is True
        self._tenant = ANYBODY
        self._before: list[Item] = []  # all that was said before the answer
        self._output = Output(request_id)
        self._response = _begun(body, f"resp_{request_id}")
        self._events = 0

    async def read(self, request_id: str, deadline: float, tenant: Tenant) -> list[Generation]:
        self._tenant = tenant
        self._prompts.check_model(self._body.model)
        check_fields(self._body, strict=self._prompts.strict)
        self._body.check_echoes()
        before: list[Item] = []
        if self._body.previous_response_id is not None:
            before = await self._kept.conversation(tenant, self._body.previous_response_id)
        chat = as_chat(self._body, before)
        self._before = [*before, *self._body.items]
        try:
            return await self._prompts.read(chat, request_id, deadline, tenant)
        except BadRequest as error:
            raise in_own_terms(error) from error

    async def whole(self, deltas: Deltas) -> str:
        finish: AnswerEnd | None = None
        async for burst in deltas:
            for delta in burst:
                for _ in self._output.feed(delta):
                    pass
                finish = delta.finish
        await self._complete(finish)
        return self._response.model_dump_json()

    async def stream(self, deltas: Deltas, events: EventStream) -> None:
        finish: AnswerEnd | None = None
        async for burst in deltas:
            shown = [] if self._events else [self._event("created"), self._event("in_progress")]
            for delta in burst:
                shown += self._output.feed(delta)
                finish = delta.finish
            await self._send(events, shown)
        await self._complete(finish)
        await self._send(events, [self._event(self._response.status)])
        await events.end()

    async def break_off(self, error: ErrorBody, events: EventStream) -> None:
        limited = error.error.type == "rate_limit_error"
        code = "rate_limit_exceeded" if limited else "server_error"
        self._response.status = "failed"
        self._response.error = ResponseFailure(code=code, message=error.error.message)
        self._response.store = False
        await self._send(events, [self._event("failed")])

    async def _complete(self, finish: AnswerEnd | None) -> None:
        response = self._response
        response.status = "incomplete" if finish == "length" else "completed"
        if finish == "length":
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        response.output, response.usage = self._output.items, _usage(self.record)
        if response.store:
            await self._kept.keep(self._tenant, response, self._before)

    def _event(self, name: Status | str) -> Event:
        return {"type": f"response.{name}", "response": self._response.model_dump(mode="json")}

    async def _send(self, events: EventStream, shown: Iterable[Event]) -> None:
        named: list[tuple[str, str]] = []
        for event in shown:
            numbered = {**event, "sequence_number": self._events}
            named.append((event["type"], msgspec.json.encode(numbered).decode()))
            self._events += 1
        if named:
            await events.named(*named)


def _begun(body: ResponsesRequest, response_id: str) -> ResponseObject:
    """As it is before there is any answer."""
    return ResponseObject(
        id=response_id,
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=body.model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        store=body.keeps,
        temperature=1.0 if body.temperature is None else body.temperature,
        text={"format": _format(body)},
        tool_choice=_dumped(body.tool_choice or "auto"),
        tools=[tool.model_dump() for tool in body.tools or ()],
        top_p=1.0 if body.top_p is None else body.top_p,
        user=body.user,
    )


def _format(body: ResponsesRequest) -> dict[str, Any]:
    form = body.text.format if body.text is not None else None
    return {"type": "text"} if form is None else form.model_dump(by_alias=True)


def _dumped(choice: Any) -> Any:
    return choice if isinstance(choice, str) else choice.model_dump()


def _usage(record: Record) -> ResponseUsage:
    usage = record.usage
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )
