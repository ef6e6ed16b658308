"""What clients send: OpenAI's two generation requests, checked as far as that needs no model.

Bodies are checked on the event loop, so a list is checked only up to its first bad element: an error
for each of 300,000 bad token ids would stop every stream for seconds.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, cast

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
)

from services.core.errors import BadRequest
from services.core.logprobs import TOP_LOGPROBS_MAX
from services.gateway.admission.fair_queue import Priority
from services.gateway.api.chat_prompt import ChatPrompt
from services.gateway.api.fields import Body
from services.gateway.api.structured import Structured
from services.gateway.api.tools import Tool, ToolChoice
from services.gateway.api.unicode_text import Text

# Parameters that would change the answer, with the values of theirs that ask for nothing.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "logits_processors": ([],),
    "use_beam_search": (False,),
    "return_tokens_as_token_ids": (False,),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
}
# The same in completions, which have no use for them.
_OF_CHATS: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "documents": ([],),
    "add_generation_prompt": (),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}
_HARMLESS = {"guided_decoding_backend", "metadata", "store", "safety_identifier"}
_TIERS = {"priority": Priority.HIGH, "flex": Priority.LOW}  # the others are normal
# In one request, whatever the gateway's settings.
PROMPTS_MAX = 2048


def _kind_of_one(prompt: object) -> str:
    return "ids" if isinstance(prompt, list) else "text"


def _kind_of_prompt(prompt: object) -> str:
    several = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    return "prompts" if several else _kind_of_one(prompt)


# Whether a text's end may become a stop string is looked for at every length.
StopString = Annotated[Text, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
_TextPrompt = Annotated[Text, Tag("text")]
_IdsPrompt = Annotated[TokenIds, Tag("ids")]
_OnePrompt = Annotated[_TextPrompt | _IdsPrompt, Discriminator(_kind_of_one)]
_Prompts = Annotated[list[_OnePrompt], Field(max_length=PROMPTS_MAX, fail_fast=True), Tag("prompts")]
Prompt = Annotated[_TextPrompt | _IdsPrompt | _Prompts, Discriminator(_kind_of_prompt)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogprobsCount = Annotated[int, Field(ge=0, le=TOP_LOGPROBS_MAX)]
BIASED_TOKENS_MAX = 1024
BAD_WORDS_MAX = 256
STOP_TOKENS_MAX = 1024
VOCABULARY_MAX = 1 << 18  # of known models; so many are checked in 20 ms
_BadWord = Annotated[Text, Field(min_length=1, max_length=200)]


def _none_for_false(value: object) -> object:
    """Clients of both endpoints send false for no logprobs."""
    return None if value is False else value


class StreamOptions(Body):
    include_usage: bool = False


class GenerationRequest(Structured):
    """What both requests share."""

    REFUSED, HARMLESS = UNSUPPORTED, _HARMLESS

    model: str
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="answers to the prompt; default 1")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="default 1; 0: greedy")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 or -1: no limit")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = Field(None, description="the same seed gives the same answer; drawn if not given")
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=STOP_TOKENS_MAX)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = Field(
        None, description="stop strings and stop tokens are a part of the text"
    )
    logit_bias: Annotated[dict[str, Bias], Field(max_length=BIASED_TOKENS_MAX)] | None = Field(
        None, description="by token id: added to the token's logit before it is sampled"
    )
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=VOCABULARY_MAX)] | None = Field(
        None, description="only these are sampled"
    )
    bad_words: Annotated[list[_BadWord], Field(max_length=BAD_WORDS_MAX, fail_fast=True)] | None = Field(
        None, description="texts that the answer will not contain"
    )
    prompt_logprobs: LogprobsCount | None = Field(
        None, description="add the logprobs of the prompt's tokens, and so many of the most probable ones"
    )
    best_of: Annotated[int, Field(ge=1)] | None = Field(None, description="only n: all answers are given")
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = Field(
        None,
        description="begin the prompt as the tokenizer does; default: in completions, chats have a template",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timings: bool | None = Field(None, description="add where the time went to the answer")
    explain: bool | None = Field(None, description="add where its attempts went, and why, to the answer")
    return_token_ids: bool | None = Field(None, description="add the answer's token ids to its choices")
    cache_salt: Text | None = Field(
        None, description="share cached prompts only with requests of the same API key and salt"
    )
    user: str | None = None
    priority: int | None = Field(None, description="below 0: before others, above 0: after them")
    service_tier: str | None = Field(None, description="priority or flex, like a priority of -1 or 1")
    ttft_max_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="refuse the request (429) if its answer cannot begin within so many seconds"
    )

    @property
    def priority_class(self) -> Priority | None:
        """`priority` as in vLLM, which wins; or OpenAI's `service_tier`. None: not asked for."""
        if self.priority is None:
            return _TIERS.get(self.service_tier or "")
        if self.priority < 0:
            return Priority.HIGH
        return Priority.LOW if self.priority > 0 else Priority.NORMAL

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def answers(self) -> int:
        """In all: choices of all prompts."""
        return self.choices

    @property
    def max_tokens_param(self) -> str:
        return "max_tokens"

    @property
    def answer_tokens_max(self) -> int | None:
        return self.max_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    @abstractmethod
    def top_logprobs_wanted(self) -> int | None:
        """Of the answer's tokens; as in SamplingParams."""

    @property
    def prompt_logprobs_wanted(self) -> int | None:
        """Of the prompt's tokens, for whatever purpose."""
        return self.prompt_logprobs

    @property
    def echoes(self) -> bool:
        """The answers begin with the prompt."""
        return False

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_supported(self) -> None:
        """Raise BadRequest for parameters that contradict each other."""
        if self.best_of is not None and self.best_of != self.choices:
            raise BadRequest(
                f"'best_of' is {self.best_of}, but this server gives every answer that it computes: leave "
                "it out, or ask for as many with 'n'.",
                "best_of",
            )
        if self.stream and self.prompt_logprobs is not None:
            raise BadRequest("'prompt_logprobs' are not available when 'stream' is true.", "prompt_logprobs")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("'stream_options' is only allowed when 'stream' is true.", "stream_options")


class ChatCompletionRequest(GenerationRequest, ChatPrompt):
    REFUSED = {**UNSUPPORTED, "echo": (False,), "suffix": ("",)}

    tool_choice: ToolChoice | None = Field(None, description="default auto")
    parallel_tool_calls: bool | None = Field(None, description="false: one call in an answer at most")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="default: the rest of the context; wins over max_tokens"
    )
    logprobs: bool | None = Field(None, description="add the logprobs of the answer's tokens")
    top_logprobs: LogprobsCount | None = Field(None, description="and so many of the most probable ones")

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check_supported(self) -> None:
        super().check_supported()
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")

    @property
    def shown_tools(self) -> Sequence[Tool]:
        """Tools that must not be called are not shown."""
        return () if self.tool_choice == "none" else super().shown_tools

    @property
    def max_tokens_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def answer_tokens_max(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationRequest):
    REFUSED = {**UNSUPPORTED, **_OF_CHATS, "top_logprobs": (0,)}

    prompt: Prompt = Field(description="text, or token ids, or a list of these: each gets n answers")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="default 16; 0 is allowed with echo"
    )
    echo: bool | None = Field(None, description="the answers begin with the prompt")
    logprobs: Annotated[LogprobsCount | None, BeforeValidator(_none_for_false)] = Field(
        None,
        description="add the tokens' logprobs, and so many most probable ones; with echo the prompt's too",
    )
    suffix: Text | None = Field(None, description="refused: models complete their prompt forwards")

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    @property
    def prompt_logprobs_wanted(self) -> int | None:
        wanted = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((each for each in wanted if each is not None), default=None)

    @property
    def echoes(self) -> bool:
        return self.echo is True

    def check_supported(self) -> None:
        super().check_supported()
        if self.suffix:
            raise BadRequest("'suffix' is not supported: models complete their prompt forwards.", "suffix")
        if self.max_tokens == 0 and not self.echo:
            raise BadRequest("'max_tokens' may be 0 only with 'echo'.", "max_tokens")

    @property
    def prompts(self) -> list[str | list[int]]:
        if self.has_list_of_prompts:
            return cast("list[str | list[int]]", self.prompt)
        return [cast("str | list[int]", self.prompt)]

    @property
    def answers(self) -> int:
        return len(self.prompts) * self.choices

    @property
    def has_list_of_prompts(self) -> bool:
        return _kind_of_prompt(self.prompt) == "prompts"


class EmbeddingsRequest(Body):
    model: str


# What pydantic calls the two in the locations of errors; no field of a request is named so.
CHAT, COMPLETION = "(chat)", "(completion)"


def kind_of_request(body: object) -> str:
    """Which of the two a body is meant to be, so that its errors are those of that one."""
    return CHAT if isinstance(body, dict) and "messages" in body else COMPLETION


AnyRequest = Annotated[
    Annotated[ChatCompletionRequest, Tag(CHAT)] | Annotated[CompletionRequest, Tag(COMPLETION)],
    Discriminator(kind_of_request),
]
