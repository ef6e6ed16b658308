"""What the prompt of a chat is made of: messages, tools, and what else chat templates take."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from services.gateway.api.fields import Body
from services.gateway.api.messages import ChatMessage
from services.gateway.api.tools import Tool, Tools
from services.gateway.api.unicode_text import Text

# In one request, whatever the gateway's settings. An object takes about 5 microseconds to check.
MESSAGES_MAX = PARTS_MAX = DOCUMENTS_MAX = 2048  # of messages OpenAI takes as many
TEMPLATE_CHARACTERS_MAX = 1 << 17  # the longest of known models have a fifth of it


class ChatPrompt(Body):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]
    tools: Tools | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=DOCUMENTS_MAX, fail_fast=True)] | None = (
        Field(None, description="for chat templates that know what to do with them")
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="for chat templates that know what to do with it"
    )
    add_generation_prompt: bool | None = Field(
        None, description="end the prompt with the begin of an answer; default: unless one is continued"
    )
    continue_final_message: bool | None = Field(
        None, description="the answer goes on where the final message ends"
    )
    chat_template: Annotated[Text, Field(max_length=TEMPLATE_CHARACTERS_MAX)] | None = Field(
        None, description="instead of the model's, where the server allows it"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables of the chat template")

    @field_validator("messages", mode="before")
    @classmethod
    def _few_parts(cls, messages: object) -> object:
        if isinstance(messages, list) and sum(map(_parts, messages[:MESSAGES_MAX])) > PARTS_MAX:
            raise ValueError(f"the messages have more than {PARTS_MAX} parts and tool calls in all")
        return messages

    @property
    def shown_tools(self) -> Sequence[Tool]:
        return self.tools or ()


def _parts(message: object) -> int:
    if not isinstance(message, dict):
        return 0
    lists = (message.get("content"), message.get("tool_calls"))
    return sum(len(parts) for parts in lists if isinstance(parts, list))
