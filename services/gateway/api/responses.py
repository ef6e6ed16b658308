"""What the API answers, in OpenAI's shapes. Fields that are not set do not appear in the JSON."""

from typing import Literal

from pydantic import BaseModel

from router.state import Part, Policy, RouteKind
from services.core.sampling import FinishReason
from services.core.worker_report import Role, State
from services.gateway.text.tool_calls.call_delta import AnswerEnd


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Timings(BaseModel):
    """Where the request's time went, in milliseconds, of the last attempt where there were several."""

    tokenize: float  # until the prompt was tokens
    route: float  # looking for cached prefixes and a route, waiting for room included
    queue: float  # at the prefill worker, before it began to compute
    prefill: float
    fetch: float  # of a prefix that another worker had cached, before the prefill
    transfer: float  # KV from prefill to decode worker, mostly while the prefill runs
    exposed_transfer: float  # the part after the prefill's end
    first_token: float  # from the request's arrival
    decode: float  # from the first to the last token
    total: float
    tokens_per_second: float  # while decoding, of all choices together
    prefill_worker: str | None  # null: the decode worker computed the prompt itself
    decode_worker: str | None
    cached_tokens_prefill: int
    cached_tokens_decode: int
    fetched_tokens: int  # of the prompt: neither cached by who computed it nor computed again
    attempts: int
    seed: int  # the client's, or the one that was drawn: with it the same request gives the same answer


class ExplainedOffer(BaseModel):
    """What it would cost to give one worker one part of the request, in milliseconds."""

    worker: str
    part: Part  # alone: the decode worker computes the prompt itself
    chosen: bool
    score: float  # by the policy; of the offers for a part the lowest wins
    cost: float  # the sum of what follows
    queue: float  # prompts ahead of this one
    fetch: float  # of a prefix that another worker has cached
    prefill: float  # the tokens that are neither cached nor fetched
    transfer: float  # KV from prefill to decode worker
    decode: float  # the first step after that
    interference: float  # how long prefills delay decoding
    cached_tokens: int  # of the prompt, when its turn comes there
    fetched_tokens: int
    fetched_from: str | None


class ExplainedRoute(BaseModel):
    """Where an attempt goes and why. Times are milliseconds."""

    policy: Policy
    kind: RouteKind
    prefill_worker: str | None  # null: the decode worker computes the prompt itself
    decode_worker: str | None  # null: one token is asked for, which the prefill worker gives
    expected_first_token: float  # from then on
    expected_queue: float  # the part of it before the prompt's turn comes there
    cost: float  # of the chosen offers together
    offers: list[ExplainedOffer]  # the chosen ones first, then the others by score


class CachedOn(BaseModel):
    """What one worker's cache holds of a prompt."""

    worker: str
    role: Role
    state: State
    cached_tokens: int
    coming_tokens: int  # that will be there once what waits there is computed


class RouteAnswer(BaseModel):
    """Where a request would go if it came now."""

    object: Literal["route"]
    model: str
    prompt_tokens: int
    expected_wait: float  # milliseconds in the gateway, before it is routed
    route: ExplainedRoute
    cached: list[CachedOn]
    unpaired: dict[str, str]  # workers that share no request with another one, and why


class ScoredChatToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(ScoredChatToken):
    top_logprobs: list[ScoredChatToken]


class ChatLogprobs(BaseModel):
    """Of all of an answer's tokens, those of a stop string and the end token included."""

    content: list[ChatToken]
    refusal: None


class CompletionLogprobs(BaseModel):
    """Of the prompt's tokens too, if the answer begins with it; nothing is known of its first one."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]  # the token itself included
    text_offset: list[int]


class PromptToken(BaseModel):
    logprob: float
    rank: int  # 1: the most probable
    decoded_token: str


# By token id, for each of the prompt's tokens but the first: the token itself and the most probable ones.
PromptLogprobs = list[dict[str, PromptToken] | None]


class FunctionCall(BaseModel):
    name: str
    arguments: str  # JSON


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatAnswer(BaseModel):
    role: Literal["assistant"]
    content: str | None  # null: tool calls only
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: AnswerEnd
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    timings: Timings | None = None
    routes: list[ExplainedRoute] | None = None  # of the attempts, the last 16


class FunctionCallDelta(BaseModel):
    name: str | None = None
    arguments: str  # a piece of the JSON


class ToolCallDelta(BaseModel):
    """The first one of a call has its id and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: AnswerEnd | None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None
    routes: list[ExplainedRoute] | None = None  # of the attempts, the last 16


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class Completion(BaseModel):
    """Both the whole answer and a chunk of it; chunks have no usage before the last one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | list[Timings] | None = None  # a list where there are several prompts, in their order
    routes: list[ExplainedRoute] | None = None  # of the attempts, the last 16 of each prompt


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int  # tokens of prompt and answer together


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Version(BaseModel):
    version: str


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetails
