"""/tokenize and /detokenize, as vLLM has them: what a prompt is to the model, without computing anything.

Both take a request's slot: tokenising is work. A long input is worked on, and its answer written, in a
thread.
"""

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
from fastapi import Response
from pydantic import BaseModel, Discriminator, Field, Tag

from services.gateway.api.chat_prompt import ChatPrompt
from services.gateway.api.fields import Body, check_fields
from services.gateway.api.schema import CHAT, COMPLETION, TokenIds, kind_of_request
from services.gateway.api.unicode_text import Text
from services.gateway.gateway import Gateway
from services.gateway.text.tokenizing import THREAD_CHARACTERS_MIN

T = TypeVar("T")

TOKENIZED_MAX = 1 << 20  # characters; their tokens are written in 20 ms, in which nothing else runs
DETOKENIZED_MAX = 1 << 18  # more than a context; so many are checked in 20 ms
_CHARACTERS_PER_TOKEN = 4  # about: what a token is as work


class TokenizeText(Body):
    model: str | None = None
    prompt: Annotated[Text, Field(max_length=TOKENIZED_MAX)]
    add_special_tokens: bool | None = Field(None, description="default true, as for a completion")
    return_token_strs: bool | None = None


class TokenizeChat(ChatPrompt):
    model: str | None = None
    add_special_tokens: bool | None = Field(None, description="default false: chat templates write them out")
    return_token_strs: bool | None = None


TokenizeRequest = Annotated[
    Annotated[TokenizeChat, Tag(CHAT)] | Annotated[TokenizeText, Tag(COMPLETION)],
    Discriminator(kind_of_request),
]


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Annotated[TokenIds, Field(max_length=DETOKENIZED_MAX)]


class Tokenized(BaseModel):
    count: int
    max_model_len: int  # tokens of prompt and answer together
    tokens: list[int]
    token_strs: list[str] | None  # as the vocabulary spells them


class Detokenized(BaseModel):
    prompt: str


class Tokenization:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway, self._prompts = gateway, gateway.prompts

    async def tokenize(self, body: TokenizeText | TokenizeChat) -> Response:
        """Raises BadRequest or Overloaded."""
        with self._gateway.admission.slot():
            self._check(body)
            ids = await self._ids(body)
            with_strings = body.return_token_strs is True
            return await _in_thread_if_long(
                len(ids) * _CHARACTERS_PER_TOKEN, lambda: self._tokenized(ids, with_strings=with_strings)
            )

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """Raises BadRequest or Overloaded."""
        with self._gateway.admission.slot():
            self._check(body)
            ids = self._prompts.checked(body.tokens, "tokens")
            return await _in_thread_if_long(len(ids) * _CHARACTERS_PER_TOKEN, lambda: self._text(ids))

    def _check(self, body: TokenizeText | TokenizeChat | DetokenizeRequest) -> None:
        self._prompts.check_model(body.model)
        check_fields(body, strict=self._prompts.strict)

    async def _ids(self, body: TokenizeText | TokenizeChat) -> list[int]:
        if isinstance(body, TokenizeText):
            return await self._prompts.of_text(
                body.prompt, add_special_tokens=body.add_special_tokens is not False
            )
        return await self._prompts.of_chat(body, add_special_tokens=body.add_special_tokens is True)

    def _tokenized(self, ids: list[int], *, with_strings: bool) -> Response:
        spelled = self._prompts.model.tokenizer.backend.id_to_token
        return _as_json(
            {
                "count": len(ids),
                "max_model_len": self._prompts.context_tokens_max(),
                "tokens": ids,
                "token_strs": [spelled(token) for token in ids] if with_strings else None,
            }
        )

    def _text(self, ids: list[int]) -> Response:
        return _as_json({"prompt": self._prompts.model.tokenizer.decode(ids, skip_special_tokens=False)})


async def _in_thread_if_long(characters: int, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if characters > THREAD_CHARACTERS_MIN else work()


def _as_json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
