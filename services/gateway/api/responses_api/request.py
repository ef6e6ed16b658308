"""What clients send to /v1/responses: OpenAI's Responses API, as far as it makes sense for a text model."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticSerializationError, from_json, to_json

from services.core.errors import BadRequest
from services.gateway.api.chat_prompt import MESSAGES_MAX, PARTS_MAX
from services.gateway.api.fields import Body
from services.gateway.api.tools import TOOLS_MAX
from services.gateway.api.unicode_text import Text

METADATA_MAX = 16
ECHOED_BYTES_MAX = 1 << 20  # of tools or of a form: events of a stream repeat them


class TextPart(Body):
    """`input_text` of whoever asks, `output_text` of an earlier answer."""

    HARMLESS = {"annotations", "logprobs"}

    type: Literal["input_text", "output_text"]
    text: Text


Parts = Annotated[list[TextPart], Field(max_length=PARTS_MAX, fail_fast=True)]


class MessageItem(Body):
    HARMLESS = {"phase"}

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text | Parts
    id: str | None = None
    status: str | None = None

    @property
    def parts(self) -> list[str]:
        return [self.content] if isinstance(self.content, str) else [part.text for part in self.content]


class FunctionCallItem(Body):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text
    id: str | None = None
    status: str | None = None


class FunctionCallOutputItem(Body):
    """What the call gave."""

    type: Literal["function_call_output"]
    call_id: Text
    output: Text | Parts
    id: str | None = None
    status: str | None = None

    @property
    def parts(self) -> list[str]:
        return [self.output] if isinstance(self.output, str) else [part.text for part in self.output]


def _kind_of_item(item: object) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return f"({'message' if kind is None else kind})"


Item = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[FunctionCallItem, Tag("(function_call)")]
    | Annotated[FunctionCallOutputItem, Tag("(function_call_output)")],
    Discriminator(
        _kind_of_item,
        custom_error_type="item",
        custom_error_message="items are messages, function calls and function call outputs",
    ),
]


def _few_parts(items: object) -> object:
    if isinstance(items, list) and sum(map(_parts, items[:MESSAGES_MAX])) > PARTS_MAX:
        raise ValueError(f"the items have more than {PARTS_MAX} parts in all")
    return items


def _parts(item: object) -> int:
    content = (item.get("content") or item.get("output")) if isinstance(item, dict) else None
    return len(content) if isinstance(content, list) else 0


Items = Annotated[
    list[Item], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True), BeforeValidator(_few_parts)
]


class FunctionTool(Body):
    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Body):
    type: Literal["function"]
    name: Text


class TextFormat(Body):
    type: Literal["text", "json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    name: Text
    schema_: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


def _kind_of_format(form: object) -> str:
    kind = form.get("type") if isinstance(form, dict) else getattr(form, "type", None)
    return "(schema)" if kind == "json_schema" else "(plain)"


Format = Annotated[
    Annotated[TextFormat, Tag("(plain)")] | Annotated[JsonSchemaFormat, Tag("(schema)")],
    Discriminator(_kind_of_format),
]


class TextOptions(Body):
    REFUSED = {"verbosity": ("medium",)}

    format: Format | None = None


class StreamOptions(Body):
    include_obfuscation: bool | None = Field(None, description="ignored: nothing is padded")


_Key = Annotated[Text, Field(max_length=64)]
_Value = Annotated[Text, Field(max_length=512)]

REFUSED: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "reasoning": ({},),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
HARMLESS = {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"}


class ResponsesRequest(Body):
    REFUSED, HARMLESS = REFUSED, HARMLESS

    model: str
    input: Text | Items = Field(description="text, or items: messages, function calls and what they gave")
    instructions: Text | None = Field(None, description="a system message for this request only")
    previous_response_id: str | None = Field(None, description="the answer after which this goes on")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="default: the rest of the context"
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="default 1; 0: greedy")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=TOOLS_MAX, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = Field(None, description="keep the answer for later requests; default true")
    metadata: Annotated[dict[_Key, _Value], Field(max_length=METADATA_MAX)] | None = None
    user: Text | None = None
    service_tier: str | None = Field(None, description="priority or flex, like a priority of -1 or 1")
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="0 or -1: no limit")
    seed: int | None = Field(None, description="the same seed gives the same answer; drawn if not given")
    cache_salt: Text | None = Field(
        None, description="share cached prompts only with requests of the same API key and salt"
    )
    priority: int | None = Field(None, description="below 0: before others, above 0: after them")
    ttft_max_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="refuse the request (429) if its answer cannot begin within so many seconds"
    )

    @property
    def items(self) -> list[Item]:
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return self.input

    @property
    def keeps(self) -> bool:
        return self.store is not False

    def check_echoes(self) -> None:
        """Raise BadRequest for fields that could not be given back, or kept and read again: what a client
        puts into schemas and into fields without a meaning may hold half of a surrogate pair, or be nested
        too deeply."""
        for name in ("input", "text", "tools", "tool_choice"):
            try:
                written = to_json({"response": {name: getattr(self, name)}})
                if name != "input" and len(written) > ECHOED_BYTES_MAX:
                    raise BadRequest(
                        f"'{name}' has {len(written)} bytes, but at most {ECHOED_BYTES_MAX} are read.", name
                    )
                from_json(written)
            except (PydanticSerializationError, ValueError):
                problem = "holds half of a surrogate pair, or is nested too deeply"
                raise BadRequest(f"'{name}' {problem}; it could not be given back.", name) from None
