"""Mistral: [TOOL_CALLS] [{...}, {...}], and since 2025 [TOOL_CALLS]name[ARGS]{...} for each call."""

import re
import secrets
import string
from collections.abc import Callable, Collection, Sequence

from services.gateway.text.tool_calls.bracket_scan import BracketScan
from services.gateway.text.tool_calls.call_grammar import CallGrammar
from services.gateway.text.tool_calls.grammar_text import call_rules, json_call, json_term, quoted
from services.gateway.text.tool_calls.json_call import JsonCall
from services.gateway.text.tool_calls.marker import Marker
from services.gateway.text.tool_calls.piece import (
    Arguments,
    CallableTool,
    CallBegins,
    Content,
    Piece,
    Written,
)

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAMED = re.compile(r"\s*([\w-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")
_NAME_MAX = 200  # characters, with its marks
_ID_LENGTH = 9  # Mistral's own templates refuse others


class MistralFormat:
    """`named`: the newer one of the two ways. Both are read; the model is held to its own."""

    markers = (CALLS, ARGS, CALL_ID)

    def __init__(self, *, named: bool = False) -> None:
        self._named = named

    def parser(self, names: Collection[str]) -> "MistralParser":
        return MistralParser(names)

    def new_call_id(self) -> str:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_ID_LENGTH))

    def grammar(self, tools: Sequence[CallableTool], written: Written, *, parallel: bool) -> CallGrammar:
        if self._named:
            calls = [f"{quoted(tool.name)} {written(ARGS)} {json_term(tool.parameters)}" for tool in tools]
            return CallGrammar("call", call_rules(calls), begin=written(CALLS), parallel=parallel)
        calls = [json_call(tool, "arguments") for tool in tools]
        body = '"[" call (", " call)* "]"' if parallel else '"[" call "]"'
        return CallGrammar(body, call_rules(calls), begin=written(CALLS))


class MistralParser:
    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._marker = Marker(CALLS)
        self._prefix = ""  # goes with what follows if that is no call
        self._held = ""
        self._call: JsonCall | None = None
        self._scan = BracketScan()
        self._in_list = False
        self._read: Callable[[str, list[Piece]], str | None] = self._text

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        rest: str | None = text
        while rest:
            rest = self._read(rest, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        held = "" if self._call is None else self._call.flush()
        text = "" if held is None else self._prefix + self._held + held
        text += self._marker.flush()
        return [Content(text)] if text else []

    def _text(self, text: str, pieces: list[Piece]) -> str | None:
        seen = self._marker.feed(text)
        if seen.before:
            pieces.append(Content(seen.before))
        if seen.after is not None:
            self._prefix, self._in_list, self._read = CALLS, False, self._first
        return seen.after

    def _first(self, text: str, pieces: list[Piece]) -> str | None:
        """Behind the marker: a list, an object, or a name."""
        begin = len(text) - len(text.lstrip())
        self._prefix += text[:begin]
        if begin == len(text):
            return None
        if text[begin] == "[":
            self._prefix += "["
            self._in_list, begin = True, begin + 1
        if self._in_list or text[begin] == "{":
            self._call, self._read = JsonCall(self._names), self._object
        else:
            self._read = self._name
        return text[begin:]

    def _object(self, text: str, pieces: list[Piece]) -> str | None:
        assert self._call is not None
        read = self._call.feed(text)
        if read.pieces:
            self._prefix = ""
        pieces += read.pieces
        if read.broken is not None:
            self._give_up(read.broken, pieces)
        elif read.rest is not None:
            self._call, self._read = None, self._between if self._in_list else self._text
        return read.rest

    def _between(self, text: str, pieces: list[Piece]) -> str | None:
        """In a list, after a call."""
        text, self._held = self._held + text, ""
        found = text.lstrip()
        if not found:
            self._held = text
            return None
        if found[0] == ",":
            self._prefix = text[: len(text) - len(found) + 1]
            self._call, self._read = JsonCall(self._names), self._object
        else:
            self._read = self._text
        return found[1:] if found[0] in ",]" else text

    def _name(self, text: str, pieces: list[Piece]) -> str | None:
        self._held += text
        brace = self._held.find("{", 0, _NAME_MAX)
        if brace < 0 and len(self._held) < _NAME_MAX:
            return None
        named = _NAMED.match(self._held)
        text, self._held = self._held, ""
        if brace < 0 or named is None or named.end() != brace or named[1] not in self._names:
            end = brace + 1 if brace >= 0 else _NAME_MAX
            self._give_up(text[:end], pieces)
            return text[end:]
        pieces.append(CallBegins(named[1]))
        self._prefix, self._scan, self._read = "", BracketScan(), self._arguments
        return text[brace:]

    def _arguments(self, text: str, pieces: list[Piece]) -> str | None:
        end = self._scan.end(text)
        pieces.append(Arguments(text[:end]))
        if end is None:
            return None
        self._read = self._text
        return text[end:]

    def _give_up(self, text: str, pieces: list[Piece]) -> None:
        pieces.append(Content(self._prefix + text))
        self._prefix, self._call, self._read = "", None, self._text
