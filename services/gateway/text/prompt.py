"""From a checked request to a Generation: chat template, tokens, limits, sampling parameters."""

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from services.core.errors import BadRequest, UnknownModel
from services.core.sampling import SamplingParams
from services.gateway.api.schema import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationRequest,
)
from services.gateway.door.tenant import ANYBODY, CacheSharing, Tenant
from services.gateway.path.generation import Generation
from services.gateway.served_model import ServedModel

T = TypeVar("T")

COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's, for /v1/completions
SEED_BITS = 63  # a seed must fit a signed 64-bit integer on a device
# Tokenising takes about a millisecond per 2,000 characters: longer prompts are rendered and tokenised
# in a thread, so that the streams of other requests go on meanwhile.
THREAD_CHARACTERS_MIN = 2_000
_MESSAGE_CHARACTERS = 50  # what rendering one message costs besides its text, as characters


@dataclass(frozen=True, slots=True)
class PromptReader:
    """`context_tokens_max` is asked at each request: workers may hold less than the model could."""

    model: ServedModel
    context_tokens_max: Callable[[], int]
    choices_max: int
    rng: random.Random  # draws the seeds that clients leave out
    cache_sharing: CacheSharing = "key"

    async def read(
        self, request: GenerationRequest, request_id: str, deadline: float, tenant: Tenant = ANYBODY
    ) -> Generation:
        """Raises BadRequest, naming the parameter, for whatever is wrong with the request."""
        if request.model != self.model.name:
            raise UnknownModel(
                f"The model '{request.model}' does not exist. This server has '{self.model.name}'.", "model"
            )
        request.check_supported()
        prompt_ids = await self._prompt_ids(request)
        return Generation(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=self._sampling(request, self._max_tokens(request, len(prompt_ids))),
            deadline=deadline,
            ttft_max_s=request.ttft_max_s,
            priority=request.priority_class,
            tenant=tenant.id,
            salt=tenant.salt(request.cache_salt or "", self.cache_sharing),
            stop=request.stop_strings,
            skip_special_tokens=request.skip_special_tokens is not False,
            choices=self._choices(request),
        )

    async def _prompt_ids(self, request: GenerationRequest) -> list[int]:
        match request:
            case CompletionRequest(prompt=list() as ids):
                prompt_ids = self._checked(ids, "prompt")
            case CompletionRequest(prompt=str() as text):
                prompt_ids = await self._tokenized(len(text), lambda: text, add_special_tokens=True)
            case ChatCompletionRequest(messages=messages):
                prompt_ids = await self._tokenized(
                    _characters(messages), lambda: self._rendered(messages), add_special_tokens=False
                )
            case _:
                raise AssertionError(f"no prompt in a {type(request).__name__}")
        if not prompt_ids:
            raise BadRequest("The prompt is empty. Give at least one token.", _prompt_param(request))
        return prompt_ids

    async def _tokenized(
        self, characters: float, text: Callable[[], str], *, add_special_tokens: bool
    ) -> list[int]:
        def encode() -> list[int]:
            return self.model.tokenizer.encode(text(), add_special_tokens=add_special_tokens)

        return await asyncio.to_thread(encode) if characters > THREAD_CHARACTERS_MIN else encode()

    def _rendered(self, messages: list[ChatMessage]) -> str:
        return self.model.tokenizer.render_chat([message.for_template() for message in messages])

    def _max_tokens(self, request: GenerationRequest, prompt_tokens: int) -> int:
        """What the client asked for, or the default, within the context."""
        limit = self.context_tokens_max()
        room = limit - prompt_tokens
        if room < 1:
            raise BadRequest(
                f"The prompt has {prompt_tokens} tokens; with at least one token of answer, this model's "
                f"context of {limit} tokens is exceeded. Shorten the prompt.",
                _prompt_param(request),
                "context_length_exceeded",
            )
        asked = request.answer_tokens_max
        if asked is not None and asked > room:
            raise BadRequest(
                f"The prompt has {prompt_tokens} tokens and {asked} were asked for the answer, but this "
                f"model's context is {limit} tokens. Ask for at most {room}, or shorten the prompt.",
                request.max_tokens_param,
                "context_length_exceeded",
            )
        if asked is not None:
            return asked
        return room if isinstance(request, ChatCompletionRequest) else min(room, COMPLETION_TOKENS_DEFAULT)

    def _choices(self, request: GenerationRequest) -> int:
        if request.choices > self.choices_max:
            raise BadRequest(
                f"'n' is {request.choices}, but this server gives at most {self.choices_max} answers.", "n"
            )
        return request.choices

    def _sampling(self, request: GenerationRequest, max_tokens: int) -> SamplingParams:
        if (request.min_tokens or 0) > max_tokens:
            raise BadRequest(f"'min_tokens' is above the answer's limit of {max_tokens}.", "min_tokens")
        stop_ids = self._checked(request.stop_token_ids or [], "stop_token_ids")
        end_ids = set() if request.ignore_eos else self.model.tokenizer.end_token_ids
        seed = self.rng.getrandbits(SEED_BITS) if request.seed is None else request.seed % (1 << SEED_BITS)
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=request.min_tokens or 0,
            temperature=_given(request.temperature, 1.0),
            top_p=_given(request.top_p, 1.0),
            top_k=min(max(_given(request.top_k, 0), 0), self.model.tokenizer.vocab_size),
            min_p=_given(request.min_p, 0.0),
            seed=seed,
            presence_penalty=_given(request.presence_penalty, 0.0),
            frequency_penalty=_given(request.frequency_penalty, 0.0),
            repetition_penalty=_given(request.repetition_penalty, 1.0),
            end_token_ids=tuple(sorted(end_ids | set(stop_ids))),
        )

    def _checked(self, ids: list[int], param: str) -> list[int]:
        outside = next((token_id for token_id in ids if token_id >= self.model.tokenizer.vocab_size), None)
        if outside is not None:
            raise BadRequest(
                f"Token id {outside} is outside the vocabulary of {self.model.tokenizer.vocab_size}.", param
            )
        return ids


def _characters(messages: list[ChatMessage]) -> float:
    """About how long a conversation is; without limit where that cannot be seen from its texts."""
    if not all(message.is_plain_text for message in messages):
        return math.inf
    return sum(len(message.content or "") + _MESSAGE_CHARACTERS for message in messages)


def _prompt_param(request: GenerationRequest) -> str:
    return "messages" if isinstance(request, ChatCompletionRequest) else "prompt"


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
