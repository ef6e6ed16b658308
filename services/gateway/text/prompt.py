"""From a checked request to Generations: chat template, tokens, limits, sampling parameters."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from services.core.errors import BadRequest, UnknownModel
from services.core.sampling import SamplingParams
from services.gateway.api.chat_prompt import ChatPrompt
from services.gateway.api.fields import check_fields
from services.gateway.api.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from services.gateway.door.tenant import ANYBODY, CacheSharing, Tenant
from services.gateway.path.generation import Generation
from services.gateway.served_model import ServedModel
from services.gateway.text.echo import check_scores, echoed
from services.gateway.text.grammar import Asked
from services.gateway.text.grammars import Grammars
from services.gateway.text.token_rules import TokenRules, token_rules
from services.gateway.text.tool_calls.tool_use import ToolUse

T = TypeVar("T")

COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's, for /v1/completions
SEED_BITS = 63  # a seed must fit a signed 64-bit integer on a device


@dataclass(frozen=True, slots=True)
class PromptReader:
    """`context_tokens_max` is asked at each request: workers may hold less than the model could."""

    model: ServedModel
    context_tokens_max: Callable[[], int]
    choices_max: int
    rng: random.Random  # draws the seeds that clients leave out
    cache_sharing: CacheSharing = "key"
    answers_max: int = 256
    strict: bool = False  # unknown fields are refused
    grammars: Grammars | None = None  # None: no request gives its answer a form

    async def read_one(
        self, request: GenerationRequest, request_id: str, deadline: float, tenant: Tenant = ANYBODY
    ) -> Generation:
        """Of a request with one prompt; another raises BadRequest."""
        if _prompts(request) > 1:
            raise BadRequest("Give one prompt: where a request goes is told for each prompt.", "prompt")
        return (await self.read(request, request_id, deadline, tenant))[0]

    async def read(
        self, request: GenerationRequest, request_id: str, deadline: float, tenant: Tenant = ANYBODY
    ) -> list[Generation]:
        """One for each prompt. Raises BadRequest, naming the parameter, for whatever is wrong with it."""
        self.check_model(request.model)
        check_fields(request, strict=self.strict)
        request.check_supported()
        self._check_answers(request)
        rules = await token_rules(request, self.model.tokenizer)
        tools = self.model.chats.tool_use(request) if isinstance(request, ChatCompletionRequest) else None
        grammar = await self._grammar(request, tools)
        prompts = await self._prompts(request)
        limits = [self._max_tokens(request, number, len(ids)) for number, ids in enumerate(prompts)]
        whole = Generation(
            request_id=request_id,
            prompt_ids=[],
            sampling=self._sampling(request, min(limits), rules, grammar),
            deadline=deadline,
            ttft_max_s=request.ttft_max_s,
            priority=tenant.priority_for(request.priority_class),
            tenant=tenant.id,
            salt=tenant.salt(request.cache_salt or "", self.cache_sharing),
            stop=request.stop_strings,
            skip_special_tokens=request.skip_special_tokens is not False,
            shows_stop=request.include_stop_str_in_output is True,
            wants_answer=request.answer_tokens_max != 0,
            choices=request.choices,
            tools=tools,
            kept_tokens=self.model.special_ids(tools.format.markers) if tools else frozenset(),
        )
        check_scores(request, prompts, limits)
        echoes = await echoed(request, prompts, self.model.token_bytes)
        return [
            self._part(request, whole, *own)
            for own in zip(_ids(whole, prompts), prompts, echoes, limits, strict=True)
        ]

    def _part(
        self,
        request: GenerationRequest,
        whole: Generation,
        own_id: str,
        prompt: list[int],
        echo: str | None,
        max_tokens: int,
    ) -> Generation:
        seed = self._seed(request)
        sampling = msgspec.structs.replace(whole.sampling, max_tokens=max_tokens, seed=seed)
        return replace(whole, request_id=own_id, prompt_ids=prompt, echo=echo, sampling=sampling)

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel."""
        if name is not None and name != self.model.name:
            raise UnknownModel(
                f"The model '{name}' does not exist. This server has '{self.model.name}'.", "model"
            )

    async def _prompts(self, request: GenerationRequest) -> list[list[int]]:
        """The tokens of each prompt, none of them empty."""
        match request:
            case CompletionRequest():
                prompts = await self._of_completion(request)
            case ChatCompletionRequest():
                special = request.add_special_tokens is True
                prompts = [await self.of_chat(request, add_special_tokens=special)]
            case _:
                raise AssertionError(f"no prompt in a {type(request).__name__}")
        if [] in prompts:
            param = _prompt_param(request, prompts.index([]))
            raise BadRequest("The prompt is empty. Give at least one token.", param)
        return prompts

    async def of_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return (await self.model.tokenizing.encode([text], add_special_tokens=add_special_tokens))[0]

    async def of_chat(self, chat: ChatPrompt, *, add_special_tokens: bool) -> list[int]:
        """Raises BadRequest, naming the parameter, for what the chat template does not take."""
        characters_max = self.model.tokenizing.characters_max(self.context_tokens_max())
        text = await self.model.chats.text(chat, characters_max)
        return await self.of_text(text, add_special_tokens=add_special_tokens)

    async def _of_completion(self, request: CompletionRequest) -> list[list[int]]:
        tokens_max = self.context_tokens_max()
        texts: list[str] = []
        for number, prompt in enumerate(request.prompts):
            if isinstance(prompt, str):
                self.model.tokenizing.check_length(prompt, tokens_max, _prompt_param(request, number))
                texts.append(prompt)
        special = request.add_special_tokens is not False
        tokenized = iter(await self.model.tokenizing.encode(texts, add_special_tokens=special))
        return [
            next(tokenized)
            if isinstance(prompt, str)
            else self.checked(prompt, _prompt_param(request, number))
            for number, prompt in enumerate(request.prompts)
        ]

    def _max_tokens(self, request: GenerationRequest, number: int, prompt_tokens: int) -> int:
        """Of an answer to prompt `number`: what the client asked for, or the default, within the context.

        Clients that cut a conversation and try again know the error by OpenAI's first words.
        """
        limit = self.context_tokens_max()
        room = limit - prompt_tokens
        if room < 1:
            raise BadRequest(
                f"This model's maximum context length is {limit} tokens, but the prompt has {prompt_tokens}, "
                "and an answer needs one at least. Shorten the prompt.",
                _prompt_param(request, number),
                "context_length_exceeded",
            )
        asked = request.answer_tokens_max
        if asked is not None and asked > room:
            raise BadRequest(
                f"This model's maximum context length is {limit} tokens, but the prompt has {prompt_tokens} "
                f"and {asked} were asked for the answer. Ask for at most {room}, or shorten the prompt.",
                request.max_tokens_param,
                "context_length_exceeded",
            )
        if asked is not None:
            return max(asked, 1)  # workers give one token at least: see Generation.wants_answer
        return room if isinstance(request, ChatCompletionRequest) else min(room, COMPLETION_TOKENS_DEFAULT)

    def _check_answers(self, request: GenerationRequest) -> None:
        prompts, choices = _prompts(request), request.choices
        if choices > self.choices_max:
            raise BadRequest(
                f"'n' is {choices}, but this server gives at most {self.choices_max} answers.", "n"
            )
        if prompts * choices > self.answers_max:
            raise BadRequest(
                f"{prompts} prompts with {choices} answers each are {prompts * choices} answers, but this "
                f"server gives at most {self.answers_max} in one request. Send several requests.",
                "prompt" if prompts > 1 else "n",
            )

    def _seed(self, request: GenerationRequest) -> int:
        """One given counts for every prompt, so each gets the answers that it gets alone. Of those drawn each
        gets another: prompts that are alike get different answers."""
        if request.seed is None:
            return self.rng.getrandbits(SEED_BITS)
        return request.seed % (1 << SEED_BITS)

    async def _grammar(self, request: GenerationRequest, tools: ToolUse | None) -> str:
        """What the request says of its answer's form, or of the calls of its tools."""
        asked = request.asked_grammar()
        if tools is not None:
            asked = self._with_calls(asked, tools)
        if asked is None:
            return ""
        assert self.grammars is not None
        return await self.grammars.grammar(*asked)

    def _with_calls(self, asked: tuple[Asked, str] | None, tools: ToolUse) -> tuple[Asked, str] | None:
        """A form of the answer does not keep the model from calling tools instead."""
        if asked is not None and tools.choice == "auto":
            calls = tools.forced(self.model.written)
            return msgspec.structs.replace(asked[0], calls=calls), asked[1]
        if asked is not None and asked[1] != "response_format":
            raise BadRequest(f"'tool_choice' demands a call, '{asked[1]}' something else.", "tool_choice")
        calls = tools.grammar(self.model.written)
        return (Asked("lark", calls), "tools") if calls else None

    def _sampling(
        self, request: GenerationRequest, max_tokens: int, rules: TokenRules, grammar: str
    ) -> SamplingParams:
        """All but the seed."""
        if (request.min_tokens or 0) > max_tokens:
            raise BadRequest(f"'min_tokens' is above the answer's limit of {max_tokens}.", "min_tokens")
        stop_ids = self.checked(request.stop_token_ids or [], "stop_token_ids")
        end_ids = set() if request.ignore_eos else self.model.tokenizer.end_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=request.min_tokens or 0,
            temperature=_given(request.temperature, 1.0),
            top_p=_given(request.top_p, 1.0),
            top_k=min(max(_given(request.top_k, 0), 0), self.model.tokenizer.vocab_size),
            min_p=_given(request.min_p, 0.0),
            presence_penalty=_given(request.presence_penalty, 0.0),
            frequency_penalty=_given(request.frequency_penalty, 0.0),
            repetition_penalty=_given(request.repetition_penalty, 1.0),
            end_token_ids=tuple(sorted(end_ids | set(stop_ids))),
            top_logprobs=request.top_logprobs_wanted,
            prompt_logprobs=request.prompt_logprobs_wanted,
            grammar=grammar,
            **rules,
        )

    def checked(self, ids: list[int], param: str) -> list[int]:
        """Raises BadRequest for an id that the model does not have."""
        outside = max(ids, default=0)
        if outside >= self.model.tokenizer.vocab_size:
            raise BadRequest(
                f"Token id {outside} is outside the vocabulary of {self.model.tokenizer.vocab_size}.", param
            )
        return ids


def _ids(whole: Generation, prompts: list[list[int]]) -> list[str]:
    """Of the request's parts, which meet each other on workers."""
    if len(prompts) == 1:
        return [whole.request_id]
    return [f"{whole.request_id}-{number}" for number in range(len(prompts))]


def _prompts(request: GenerationRequest) -> int:
    return len(request.prompts) if isinstance(request, CompletionRequest) else 1


def _prompt_param(request: GenerationRequest, number: int) -> str:
    if not isinstance(request, CompletionRequest):
        return "messages"
    return f"prompt[{number}]" if request.has_list_of_prompts else "prompt"


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
