"""OpenAI's two answer formats: whole, and as the chunks of a stream."""

import time
from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel

from router.state import Route
from services.gateway.api.explanation import explained
from services.gateway.api.logprobs import Fields, array, ascii_json, extended
from services.gateway.api.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    CompletionChoice,
    FunctionCall,
    FunctionCallDelta,
    Timings,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from services.gateway.text.answer import TextDelta
from services.gateway.text.tool_calls.call_delta import AnswerEnd, CallDelta

AnswerBody = ChatCompletion | ChatCompletionChunk | Completion


class AnswerFormat(Protocol):
    def whole(self, answers: Sequence[TextDelta], usage: Usage) -> ChatCompletion | Completion: ...

    def opening(self, choice: int) -> ChatCompletionChunk | None:
        """The chunk before the first text of a choice, if the format has one."""
        ...

    def chunk(self, delta: TextDelta) -> ChatCompletionChunk | Completion: ...

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk | Completion:
        """The last chunk of a stream whose client asked for usage: it has no choices."""
        ...


class ChatFormat:
    def __init__(self, request_id: str, model: str) -> None:
        self._id, self._model, self._created = f"chatcmpl-{request_id}", model, int(time.time())

    def whole(self, answers: Sequence[TextDelta], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=list(map(self._choice, answers)),
            usage=usage,
        )

    def opening(self, choice: int) -> ChatCompletionChunk:
        return self._chunk(choice, ChatDelta(role="assistant", content=""), None)

    def chunk(self, delta: TextDelta) -> ChatCompletionChunk:
        more = ChatDelta(content=delta.text) if delta.text else ChatDelta()
        if delta.calls:
            more.tool_calls = list(map(_call_delta, delta.calls))
        return self._chunk(delta.choice, more, delta.finish)

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return self._chunk_of([], usage=usage)

    def _choice(self, answer: TextDelta) -> ChatChoice:
        message = ChatAnswer(role="assistant", content=answer.text, refusal=None)
        if answer.calls:
            message.content = answer.text or None
            message.tool_calls = list(map(_call, answer.calls))
        assert answer.finish is not None
        return ChatChoice(index=answer.choice, message=message, logprobs=None, finish_reason=answer.finish)

    def _chunk(self, choice: int, delta: ChatDelta, finish: AnswerEnd | None) -> ChatCompletionChunk:
        return self._chunk_of(
            [ChatChunkChoice(index=choice, delta=delta, logprobs=None, finish_reason=finish)]
        )

    def _chunk_of(self, choices: list[ChatChunkChoice], **more: Usage) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **more,
        )


class CompletionFormat:
    def __init__(self, request_id: str, model: str) -> None:
        self._id, self._model, self._created = f"cmpl-{request_id}", model, int(time.time())

    def whole(self, answers: Sequence[TextDelta], usage: Usage) -> Completion:
        return self._completion(list(map(self._choice, answers)), usage=usage)

    def opening(self, choice: int) -> None:
        return None

    def chunk(self, delta: TextDelta) -> Completion:
        return self._completion([self._choice(delta)])

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage=usage)

    def _choice(self, delta: TextDelta) -> CompletionChoice:
        return CompletionChoice(
            index=delta.choice, text=delta.text, logprobs=None, finish_reason=delta.finish
        )

    def _completion(self, choices: list[CompletionChoice], **more: Usage) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            **more,
        )


def _call(call: CallDelta) -> ToolCall:
    assert call.id is not None
    assert call.name is not None
    function = FunctionCall(name=call.name, arguments=call.arguments)
    return ToolCall(id=call.id, type="function", function=function)


def _call_delta(call: CallDelta) -> ToolCallDelta:
    if call.name is None:
        return ToolCallDelta(index=call.number, function=FunctionCallDelta(arguments=call.arguments))
    function = FunctionCallDelta(name=call.name, arguments=call.arguments)
    return ToolCallDelta(index=call.number, id=call.id, type="function", function=function)


def as_json(
    body: AnswerBody,
    token_ids: Sequence[Sequence[int]] | None = None,
    timings: Timings | list[Timings] | None = None,
    routes: Sequence[Route] | None = None,
    choice_fields: Sequence[Fields] | None = None,
    body_fields: Fields | None = None,
) -> str:
    """`body` with the extras that the client asked for, and without the fields that nobody set. The last two
    are JSON already: fields of the choices, and of the body."""
    if token_ids is not None:
        of_choices = iter(token_ids)
        for choice in body.choices:
            choice.token_ids = list(next(of_choices))
    if timings is not None:
        body.timings = timings
    if routes is not None:
        body.routes = list(map(explained, routes))
    if choice_fields is None:
        return body.model_dump_json(exclude_unset=True)
    choices = [_choice_json(*own) for own in zip(body.choices, choice_fields, strict=True)]
    plain = ascii_json(body.model_dump_json(exclude_unset=True, exclude={"choices"}))
    return extended(plain, {"choices": array(choices), **(body_fields or {})})


def _choice_json(choice: BaseModel, more: Fields) -> str:
    return extended(ascii_json(choice.model_dump_json(exclude_unset=True, exclude=set(more))), more)
