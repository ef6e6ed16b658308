"""Grammars of tool calls, in llguidance's dialect of Lark (its docs/syntax.md).

Each tool's schema is a JSON grammar of its own inside the call's fixed text, so that what its $refs
point to stays where it was.
"""

import json
from collections.abc import Sequence
from typing import Any

from services.gateway.text.grammar import followable
from services.gateway.text.tool_calls.piece import CallableTool

# As models are trained to write JSON. With free blanks a small one may write nothing else any more.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def call_rules(calls: Sequence[str]) -> list[str]:
    """What `call` is: any of `calls`."""
    rules = [f"call_{n}: {call}" for n, call in enumerate(calls)]
    return ["call: " + " | ".join(f"call_{n}" for n in range(len(calls))), *rules]


def json_call(tool: CallableTool, arguments_key: str) -> str:
    """{"name": "NAME", "KEY": {...}}"""
    # The brace is a lexeme of its own, as it is in JSON: an answer may be an object, and lexing is greedy.
    head = f'"name": "{tool.name}", "{arguments_key}": '
    return f'"{{" {quoted(head)} {json_term(tool.parameters)} "}}"'


def json_term(schema: dict[str, Any]) -> str:
    return f"%json {json.dumps(followable(schema, **_SPACING))}"


def quoted(text: str) -> str:
    return json.dumps(text)
