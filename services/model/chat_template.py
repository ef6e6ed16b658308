"""A model's chat template: messages -> prompt text, in the Jinja dialect of Hugging Face.

The dialect: blocks trimmed, `break` and `continue`, `raise_exception(text)`, `strftime_now(format)`,
a `tojson` that does not escape HTML, `{% generation %}` (marks the assistant's text for training; its
content is kept), the special tokens as variables, and `tools` and `documents`, none if not given.

A template comes with the model's file, or from a client, and is a program: it runs in a sandbox, and
gateways run it in a process of its own, because nothing in Python can stop one that loops.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import msgspec
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.core.errors import BadRequest
from services.model.plain_tools import with_plain_tools

_FOREIGN_KEPT = 8  # compiled templates of clients
_PROBLEM_CHARACTERS_MAX = 1000  # of a template's own error
# Where the last message ends in the rendered text. The blank shows whether the template strips messages.
_END_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class Chat(msgspec.Struct, frozen=True, kw_only=True):
    """All that a prompt text depends on besides the model's own template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the answer goes on where the last message ends
    variables: dict[str, Any] = {}  # further ones, for this template
    template: str | None = None  # the client's, instead of the model's
    plain_tools: bool = False  # the template's own way of writing tools is not wanted
    characters_max: int | None = None  # a longer text is refused as soon as it is seen to be one

    @property
    def template_param(self) -> str:
        """Whom to blame for what goes wrong."""
        return "messages" if self.template is None else "chat_template"


@dataclass(frozen=True)
class ChatTemplate:
    """The templates of a model by name; most have only "default", some also "tool_use"."""

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]  # e.g. {"bos_token": "<s>"}

    def source(self, *, tools: bool) -> str | None:
        """The template for requests with or without tools; None: the model has none."""
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        return self.sources.get(name)

    def render(self, chat: Chat) -> str:
        """Raises BadRequest, of the messages or the client's template, if there is no template, it fails,
        or the text becomes too long."""
        source = chat.template if chat.template is not None else self.source(tools=bool(chat.tools))
        if source is None:
            raise BadRequest(
                "This model has no chat template. Use /v1/completions with a plain prompt instead.",
                param="messages",
            )
        try:
            return self._rendered(chat, source)
        except BadRequest:
            raise
        except Exception as error:
            # Templates index and concatenate what the client sent, so any Python error can come out
            # of one; whichever it is, these messages do not fit this template.
            problem = (str(error) or type(error).__name__)[:_PROBLEM_CHARACTERS_MAX]
            whose = "model's" if chat.template is None else "request's"
            message = f"The {whose} chat template refused the messages: {problem}"
            raise BadRequest(message, chat.template_param) from error

    def _rendered(self, chat: Chat, source: str) -> str:
        given = {"tools": None, "documents": None, **self.special_tokens, **chat.variables}
        given |= {"messages": _messages(chat, source), "add_generation_prompt": chat.add_generation_prompt}
        if chat.tools and knows(source, "tools") and not chat.plain_tools:
            given["tools"] = chat.tools
        if chat.documents:
            if not knows(source, "documents"):
                raise BadRequest("The chat template has no place for 'documents'.", "documents")
            given["documents"] = chat.documents
        text = _joined(self._compiled[source].generate(given), chat.characters_max)
        return _up_to_tag(text) if chat.continue_final_message else text

    @cached_property
    def _compiled(self) -> "_CompiledTemplates":
        return _CompiledTemplates(self.sources)


def knows(source: str, variable: str) -> bool:
    """Whether a template has anything to do with a variable."""
    return re.search(rf"\b{variable}\b", source) is not None


def _messages(chat: Chat, source: str) -> list[dict[str, Any]]:
    # OpenAI clients send `"content": null` beside tool calls; templates would write the word None.
    stated = [
        {key: value for key, value in message.items() if value is not None} for message in chat.messages
    ]
    messages = [_with_parsed_arguments(message) for message in stated]
    if chat.plain_tools or not knows(source, "tools"):
        messages = with_plain_tools(messages, chat.tools or [])
    if chat.continue_final_message:
        messages[-1] = {**messages[-1], "content": messages[-1]["content"] + _END_TAG}
    return messages


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Clients send the arguments of tool calls as JSON texts, templates expect objects."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": list(map(_with_parsed, message["tool_calls"]))}


def _with_parsed(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:  # what a model wrote need not be valid; the template gets it as it is
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _joined(pieces: Iterable[str], characters_max: int | None) -> str:
    text: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if characters_max is not None and length > characters_max:
            raise too_long(characters_max)
        text.append(piece)
    return "".join(text)


def too_long(characters_max: int) -> BadRequest:
    return BadRequest(
        f"As a prompt the messages have more than {characters_max} characters, which is beyond this model's "
        "context. Shorten them.",
        "messages",
        "context_length_exceeded",
    )


def _up_to_tag(text: str) -> str:
    """As transformers does it: a template that strips its messages also strips the last one."""
    end = text.rfind(_END_TAG.rstrip())
    if end < 0:
        raise BadRequest(
            "The chat template left the final message out, so it cannot be continued.",
            "continue_final_message",
        )
    return text[:end] if text[end:].startswith(_END_TAG) else text[:end].rstrip()


class _CompiledTemplates(dict[str, Template]):
    """Compiles each source when it is first used. The model's own stay, and the latest of clients."""

    def __init__(self, own: Mapping[str, str]) -> None:
        super().__init__()
        self._own = frozenset(own.values())
        self._environment = _environment()

    def __missing__(self, source: str) -> Template:
        foreign = [known for known in self if known not in self._own]
        if len(foreign) >= _FOREIGN_KEPT:
            del self[foreign[0]]
        self[source] = self._environment.from_string(source)
        return self[source]


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: its content, unmarked, in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
