"""The messages of a chat: roles, content, and the tool calls of earlier answers."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from services.gateway.api.fields import Body
from services.gateway.api.tools import FunctionName
from services.gateway.api.unicode_text import Text


def _readable(kind: object) -> object:
    """So that a picture gets a better answer than a list of what would be allowed."""
    if kind == "text" or not isinstance(kind, str):
        return kind
    raise ValueError(f"this model reads text only, so parts of type {kind[:100]!r} are not supported")


class TextPart(Body):
    type: Annotated[Literal["text"], BeforeValidator(_readable)]
    text: Text


class RefusalPart(Body):
    """Of an earlier answer."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        return self.refusal


def _kind_of_part(part: object) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    return "(refusal)" if kind == "refusal" else "(text)"


# The tags are no keys of a part, so that none is taken for one in the location of an error.
ContentPart = Annotated[
    Annotated[TextPart, Tag("(text)")] | Annotated[RefusalPart, Tag("(refusal)")],
    Discriminator(_kind_of_part),
]


class CalledFunction(Body):
    name: FunctionName
    # OpenAI's clients send a JSON text. What a model once wrote there need not be valid.
    arguments: Text | dict[str, Any] = ""


class CalledTool(Body):
    """A call that an earlier answer made. Further fields go to the chat template as they are."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """Further fields go to the chat template as they are."""

    HARMLESS = {"audio", "annotations", "function_call"}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[ContentPart], Field(fail_fast=True)] | None = None
    name: Text | None = None
    refusal: Text | None = Field(None, description="of an earlier answer: its text, if it has no content")
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = Field(None, description="which call a tool's message answers")

    @model_validator(mode="after")
    def _only_assistants_may_be_silent(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a {self.role} message cannot have tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates know messages: content is one string, the developer is the system."""
        message: dict[str, Any] = {**(self.model_extra or {}), "role": self._role, "content": self._text}
        for key in ("name", "tool_call_id"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return message

    @property
    def _role(self) -> str:
        return "system" if self.role == "developer" else self.role

    @property
    def _text(self) -> str | None:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.refusal if self.content is None else self.content
