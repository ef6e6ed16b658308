"""OpenAI's two answer formats: whole, and as the chunks of a stream."""

import time
from collections.abc import Sequence
from typing import Protocol

from services.core.sampling import FinishReason
from services.gateway.answer import TextDelta
from services.gateway.responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    CompletionChoice,
    Timings,
    Usage,
)


class AnswerFormat(Protocol):
    def whole(self, text: str, finish: FinishReason, usage: Usage) -> ChatCompletion | Completion: ...

    def opening(self) -> ChatCompletionChunk | None:
        """The chunk before the first text, if the format has one."""
        ...

    def chunk(self, delta: TextDelta) -> ChatCompletionChunk | Completion: ...

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk | Completion:
        """The last chunk of a stream whose client asked for usage: it has no choices."""
        ...


class ChatFormat:
    def __init__(self, request_id: str, model: str) -> None:
        self._id, self._model, self._created = f"chatcmpl-{request_id}", model, int(time.time())

    def whole(self, text: str, finish: FinishReason, usage: Usage) -> ChatCompletion:
        message = ChatAnswer(role="assistant", content=text, refusal=None)
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[ChatChoice(index=0, message=message, logprobs=None, finish_reason=finish)],
            usage=usage,
        )

    def opening(self) -> ChatCompletionChunk:
        return self._chunk(ChatDelta(role="assistant", content=""), None)

    def chunk(self, delta: TextDelta) -> ChatCompletionChunk:
        return self._chunk(ChatDelta(content=delta.text) if delta.text else ChatDelta(), delta.finish)

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        return self._chunk_of([], usage=usage)

    def _chunk(self, delta: ChatDelta, finish: FinishReason | None) -> ChatCompletionChunk:
        return self._chunk_of([ChatChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish)])

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

    def whole(self, text: str, finish: FinishReason, usage: Usage) -> Completion:
        return self._completion([self._choice(text, finish)], usage=usage)

    def opening(self) -> None:
        return None

    def chunk(self, delta: TextDelta) -> Completion:
        return self._completion([self._choice(delta.text, delta.finish)])

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage=usage)

    def _choice(self, text: str, finish: FinishReason | None) -> CompletionChoice:
        return CompletionChoice(index=0, text=text, logprobs=None, finish_reason=finish)

    def _completion(self, choices: list[CompletionChoice], **more: Usage) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            **more,
        )


def as_json(
    body: ChatCompletion | ChatCompletionChunk | Completion,
    timings: Timings | None = None,
    token_ids: Sequence[int] | None = None,
) -> str:
    """`body` with the extras that the client asked for, and without the fields that nobody set."""
    if token_ids is not None:
        for choice in body.choices:
            choice.token_ids = list(token_ids)
    if timings is not None:
        body.timings = timings
    return body.model_dump_json(exclude_unset=True)
