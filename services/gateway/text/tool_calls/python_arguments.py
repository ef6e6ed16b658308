"""Keyword arguments as Python writes them: key=value, ... with values of constants, lists and dicts.

Python's own parser is not used: it may crash on deeply nested text, and this text comes from anybody
who can make a model say something.
"""

import json
import re
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
    r"|(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)|(?P<word>[^\W\d][\w-]*)|(?P<mark>[()\[\]{},:=]))",
    re.DOTALL,
)
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_CLOSING = {"[": "]", "(": ")"}
_ESCAPE = re.compile(r'\\x([0-9a-fA-F]{2})|\\(.)|"', re.DOTALL)
_DEPTH_MAX = 100
_DIGITS_MAX = 300


def keyword_arguments(text: str) -> dict[str, Any]:
    """The arguments in `text`, which stood between round brackets. Raises ValueError."""
    return _Reader(text).arguments()


class _Reader:
    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text.rstrip()))
        self._at = 0

    def arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        while self._at < len(self._tokens):
            kind, name = self._take()
            if kind != "word" or self._take() != ("mark", "="):
                raise ValueError("an argument has no name")
            arguments[name] = self._value(0)
            if self._at < len(self._tokens) and self._take() != ("mark", ","):
                raise ValueError("two arguments without a comma")
        return arguments

    def _take(self) -> tuple[str, str]:
        if self._at >= len(self._tokens):
            raise ValueError("the value ends too early")
        self._at += 1
        return self._tokens[self._at - 1]

    def _value(self, depth: int) -> Any:
        match self._take():
            case ("string", text):
                return _string(text)
            case ("number", text) if len(text) <= _DIGITS_MAX:
                return json.loads(text)
            case ("word", text) if text in _CONSTANTS:
                return _CONSTANTS[text]
            case ("mark", "[" | "(" as opening) if depth < _DEPTH_MAX:
                return self._items(_CLOSING[opening], depth + 1)
            case ("mark", "{") if depth < _DEPTH_MAX:
                return self._entries(depth + 1)
        raise ValueError("this is no value")

    def _items(self, closing: str, depth: int) -> list[Any]:
        items: list[Any] = []
        while not self._closes(closing):
            items.append(self._value(depth))
            self._comma_unless(closing)
        return items

    def _entries(self, depth: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        while not self._closes("}"):
            kind, key = self._take()
            if kind != "string" or self._take() != ("mark", ":"):
                raise ValueError("a key is not a string")
            entries[_string(key)] = self._value(depth)
            self._comma_unless("}")
        return entries

    def _closes(self, closing: str) -> bool:
        if self._at < len(self._tokens) and self._tokens[self._at] == ("mark", closing):
            self._at += 1
            return True
        return False

    def _comma_unless(self, closing: str) -> None:
        if self._at < len(self._tokens) and self._tokens[self._at] == ("mark", closing):
            return
        if self._take() != ("mark", ","):
            raise ValueError("two values without a comma")


def _tokens(text: str) -> "list[tuple[str, str]]":
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or found.lastgroup is None:
            raise ValueError("this is not written as Python")
        tokens.append((found.lastgroup, found[found.lastgroup]))
        at = found.end()
    return tokens


def _string(text: str) -> str:
    value = json.loads(f'"{_ESCAPE.sub(_as_json, text[1:-1])}"', strict=False)
    assert isinstance(value, str)
    return value


def _as_json(escape: re.Match[str]) -> str:
    """Python's escapes and bare quotes, as JSON writes them."""
    if escape[1]:
        return rf"\u00{escape[1]}"
    match escape[2]:
        case None:
            return r"\""
        case "'":
            return "'"
        case "\n":
            return ""
        case character if character in 'nrtbfu"/\\':
            return escape[0]
        case character:
            return rf"\\{character}"
