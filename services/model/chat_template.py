"""A model's chat template: messages -> prompt text, in the Jinja dialect of Hugging Face.

The dialect: blocks trimmed, `break` and `continue`, `raise_exception(text)`, `strftime_now(format)`,
a `tojson` that does not escape HTML, `{% generation %}` (marks the assistant's text for training; its
content is kept), the special tokens as variables, and `tools` and `documents`, none if not given.

A template comes with the model's file and is a program, so it runs in a sandbox.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from services.core.errors import BadRequest


@dataclass(frozen=True)
class ChatTemplate:
    """The templates of a model by name; most have only "default", some also "tool_use"."""

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]  # e.g. {"bos_token": "<s>"}

    def render(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """Raises BadRequest(param="messages") if there is no template or it refuses the messages."""
        name = "tool_use" if variables.get("tools") and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise BadRequest(
                "This model has no chat template. Use /v1/completions with a plain prompt instead.",
                param="messages",
            )
        given = {"tools": None, "documents": None, **self.special_tokens, **variables}
        # OpenAI clients send `"content": null` beside tool calls; templates would write the word None.
        stated = [{key: value for key, value in message.items() if value is not None} for message in messages]
        given |= {"messages": stated, "add_generation_prompt": add_generation_prompt}
        try:
            return self._compiled[name].render(given)
        except Exception as error:
            # Templates index and concatenate what the client sent, so any Python error can come out
            # of one; whichever it is, these messages do not fit this template.
            problem = str(error) or type(error).__name__
            raise BadRequest(
                f"The model's chat template refused the messages: {problem}", param="messages"
            ) from error

    @cached_property
    def _compiled(self) -> "_CompiledTemplates":
        return _CompiledTemplates(self.sources)


class _CompiledTemplates(dict[str, Template]):
    """Compiles each source when it is first used."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        super().__init__()
        self._sources = sources
        self._environment = _environment()

    def __missing__(self, name: str) -> Template:
        self[name] = self._environment.from_string(self._sources[name])
        return self[name]


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
