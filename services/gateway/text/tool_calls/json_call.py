"""One call as a JSON object, {"name": ..., "arguments": {...}}, while it is being written."""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from services.gateway.text.tool_calls.bracket_scan import BracketScan
from services.gateway.text.tool_calls.piece import Arguments, CallBegins, Piece

# As models write it nearly always; then the arguments go out as they come.
_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([\w-]+)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_CLOSED = re.compile(r"\s*\}")
_BLANK = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Read:
    """What a piece of text brought, and what of it is left, if the call has ended."""

    pieces: list[Piece]
    rest: str | None = None
    broken: str | None = None  # it was no call: its text from the object's begin on; `rest` follows it


class JsonCall:
    """Feed it until `rest` is there."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._scan = BracketScan()
        self._read: Callable[[str], Read] = self._head

    def feed(self, text: str) -> Read:
        return self._read(text)

    def flush(self) -> str | None:
        """Once no more text comes: what was held back, or None if it is part of a call."""
        return self._held if self._read == self._head else None

    def _head(self, text: str) -> Read:
        """Until the name is known, or the object is whole and has no such begin."""
        seen, self._held = len(self._held), self._held + text
        if head := _HEAD.match(self._held):
            if head[1] not in self._names:
                return self._broken(head.end())
            arguments, self._held = self._held[head.end() :], ""
            self._scan, self._read = BracketScan(), self._arguments
            return _after([CallBegins(head[1])], self._arguments(arguments))
        begin = _blanks(self._held)
        if begin < len(self._held) and self._held[begin] != "{":
            return self._broken(begin)
        end = self._scan.end(text)
        return Read([]) if end is None else self._whole(seen + end)

    def _whole(self, end: int) -> Read:
        call = _parsed(self._held[:end])
        if call is None or call[0] not in self._names:
            return self._broken(end)
        return Read([CallBegins(call[0]), Arguments(call[1])], self._held[end:])

    def _broken(self, end: int) -> Read:
        return Read([], self._held[end:], self._held[:end])

    def _arguments(self, text: str) -> Read:
        end = self._scan.end(text)
        if end is None:
            return Read([Arguments(text)] if text else [])
        self._read = self._tail
        return _after([Arguments(text[:end])], self._tail(text[end:]))

    def _tail(self, text: str) -> Read:
        """After the arguments: the object's end, perhaps behind further keys."""
        self._held += text
        begin = _blanks(self._held)
        if begin == len(self._held):
            return Read([])
        held, self._held = self._held, ""
        if held[begin] != ",":
            closed = _CLOSED.match(held)
            return Read([], held[closed.end() :] if closed else held)
        self._scan, self._read = BracketScan(depth=1), self._further
        return self._further(held)

    def _further(self, text: str) -> Read:
        end = self._scan.end(text)
        return Read([]) if end is None else Read([], text[end:])


def _after(pieces: list[Piece], read: Read) -> Read:
    return Read([*pieces, *read.pieces], read.rest, read.broken)


def _blanks(text: str) -> int:
    blank = _BLANK.match(text)
    assert blank is not None
    return blank.end()


def _parsed(text: str) -> tuple[str, str] | None:
    """Name and arguments of a whole object, whatever the order of its keys."""
    try:
        call = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):  # some models quote the object
        arguments = _object(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict | None):
        return None
    return name, as_arguments(arguments or {})


def _object(text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return text


def as_arguments(arguments: dict[str, Any]) -> str:
    """As JSON; half of a surrogate pair, which a model may escape, has no other form than escaped."""
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)
    return text
