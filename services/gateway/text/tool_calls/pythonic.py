"""Llama 3.2 and 4: [name(key=value, ...), ...] as the whole answer, values as Python literals."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from services.gateway.text.tool_calls.bracket_scan import BracketScan
from services.gateway.text.tool_calls.call_grammar import CallGrammar
from services.gateway.text.tool_calls.grammar_text import call_rules, json_term, quoted
from services.gateway.text.tool_calls.hermes import new_call_id
from services.gateway.text.tool_calls.json_call import as_arguments
from services.gateway.text.tool_calls.piece import (
    Arguments,
    CallableTool,
    CallBegins,
    Content,
    Piece,
    Written,
)
from services.gateway.text.tool_calls.python_arguments import keyword_arguments

BEGIN, END = "<|python_start|>", "<|python_end|>"
_CALL = re.compile(r"\s*([\w-]+)\s*\(")
_NOT_OF_NAME = re.compile(r"[^\w\s-]")


class PythonicFormat:
    markers = (BEGIN, END)

    def parser(self, names: Collection[str]) -> "PythonicParser":
        return PythonicParser(names)

    def new_call_id(self) -> str:
        return new_call_id()

    def grammar(self, tools: Sequence[CallableTool], written: Written, *, parallel: bool) -> CallGrammar:
        """Values are JSON, which is Python but for three words that the parser knows."""
        calls = [f'{quoted(tool.name + "(")} arguments_{n} ")"' for n, tool in enumerate(tools)]
        arguments = [rule for n, tool in enumerate(tools) for rule in _argument_rules(f"arguments_{n}", tool)]
        body = '"[" call (", " call)* "]"' if parallel else '"[" call "]"'
        return CallGrammar(body, [*call_rules(calls), *arguments], first="[")


class PythonicParser:
    """Looks at whole calls: what is not yet one, or will never be, is in `_held`."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._at = 0  # in it: what comes next is looked for here
        self._name = ""
        self._scan = BracketScan()
        self._scanned = 0
        self._read: Callable[[list[Piece]], bool] = self._begin

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        self._held += text
        while self._held and self._read(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        return [Content(self._held)] if self._held and self._read != self._end else []

    def _begin(self, pieces: list[Piece]) -> bool:
        text = self._held.lstrip()
        if BEGIN.startswith(text) and text != BEGIN:  # or there is none yet
            return False
        inner = text.removeprefix(BEGIN).lstrip()
        if not inner:
            return False
        if inner[0] != "[":
            return self._give_up(pieces)
        self._at, self._read = len(self._held) - len(inner) + 1, self._call
        return True

    def _call(self, pieces: list[Piece]) -> bool:
        """The name of a call and the bracket behind it."""
        if _NOT_OF_NAME.search(self._held, self._at) is None:
            return False
        call = _CALL.match(self._held, self._at)
        if call is None or call[1] not in self._names:
            return self._give_up(pieces)
        self._name, self._at, self._scanned = call[1], call.end(), call.end()
        self._scan, self._read = BracketScan(depth=1, python=True), self._arguments
        return True

    def _arguments(self, pieces: list[Piece]) -> bool:
        end = self._scan.end(self._held[self._scanned :])
        if end is None:
            self._scanned = len(self._held)
            return False
        end += self._scanned
        try:
            arguments = keyword_arguments(self._held[self._at : end - 1])
        except ValueError:
            return self._give_up(pieces)
        pieces += [CallBegins(self._name), Arguments(as_arguments(arguments))]
        self._held, self._read = self._held[end:], self._between
        return True

    def _between(self, pieces: list[Piece]) -> bool:
        text = self._held.lstrip()
        if not text:
            return False
        if text[0] == ",":
            self._at, self._read = len(self._held) - len(text) + 1, self._call
        elif text[0] == "]":
            self._held, self._read = text[1:], self._end
        else:
            return self._give_up(pieces)
        return True

    def _end(self, pieces: list[Piece]) -> bool:
        text = self._held.lstrip()
        if END.startswith(text) and text != END:
            return False
        if text.startswith(END):
            self._held = text.removeprefix(END)
        return self._give_up(pieces)

    def _text(self, pieces: list[Piece]) -> bool:
        pieces.append(Content(self._held))
        self._held = ""
        return False

    def _give_up(self, pieces: list[Piece]) -> bool:
        """The rest of the answer is text."""
        self._read = self._text
        return True


def _argument_rules(rule: str, tool: CallableTool) -> Iterator[str]:
    """`rule` and what it needs: the properties in their order, those that are not required may be left out.

    RULE_k is what may follow when the next property is the k-th and others came before, RULE_k_first
    when none did.
    """
    schema = tool.parameters
    properties: dict[str, Any] = schema.get("properties") or {}
    required = set(schema.get("required") or ())
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    yield f"{rule}: {rule}_0_first"
    for k, (key, value) in enumerate(properties.items()):
        term = json_term({**shared, **(value if isinstance(value, dict) else {})})
        yield f"{rule}_{k}_value: {quoted(key + '=')} {term}"
        skip = "" if key in required else f" | {rule}_{k + 1}_first"
        yield f"{rule}_{k}_first: {rule}_{k}_value {rule}_{k + 1}{skip}"
        skip = "" if key in required else f" | {rule}_{k + 1}"
        yield f'{rule}_{k}: ", " {rule}_{k}_value {rule}_{k + 1}{skip}'
    last = len(properties)
    yield f'{rule}_{last}_first: ""'
    yield f'{rule}_{last}: ""'
