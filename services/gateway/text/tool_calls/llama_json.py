"""Llama 3: {"name": ..., "parameters": {...}} as the whole answer, or behind <|python_tag|>."""

from collections.abc import Collection, Sequence

from services.gateway.text.tool_calls.call_grammar import CallGrammar
from services.gateway.text.tool_calls.grammar_text import call_rules, json_call
from services.gateway.text.tool_calls.hermes import new_call_id
from services.gateway.text.tool_calls.json_call import JsonCall
from services.gateway.text.tool_calls.marker import Marker
from services.gateway.text.tool_calls.piece import CallableTool, Content, Piece, Written

TAG = "<|python_tag|>"
_BETWEEN = " \t\r\n;,"  # calls


class LlamaJsonFormat:
    markers = (TAG,)

    def parser(self, names: Collection[str]) -> "LlamaJsonParser":
        return LlamaJsonParser(names)

    def new_call_id(self) -> str:
        return new_call_id()

    def grammar(self, tools: Sequence[CallableTool], written: Written, *, parallel: bool) -> CallGrammar:
        rules = call_rules([json_call(tool, "parameters") for tool in tools])
        return CallGrammar("call", rules, first="{", between='"; "', parallel=parallel)


class LlamaJsonParser:
    """An object further on in the text is a call only with the tag before it."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._marker = Marker(TAG)
        self._call: JsonCall | None = None
        self._prefix = ""  # before the object: it goes with it if that is no call
        self._expects_call = True

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        rest: str | None = text
        while rest:
            if self._call is not None:
                rest = self._feed_call(self._call, rest, pieces)
            elif self._expects_call:
                rest = self._feed_between(rest, pieces)
            else:
                rest = self._feed_text(rest, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        held = "" if self._call is None else self._call.flush()
        text = (self._prefix + held if held is not None else "") + self._marker.flush()
        return [Content(text)] if text else []

    def _feed_between(self, text: str, pieces: list[Piece]) -> str | None:
        """At the answer's begin, after the tag, or after a call: is there another one?"""
        begin = len(text) - len(text.lstrip(_BETWEEN))
        self._prefix += text[:begin]
        if begin == len(text):
            return None
        self._expects_call = False
        if text[begin] == "{":
            self._call = JsonCall(self._names)
        else:
            self._give_up("", pieces)
        return text[begin:]

    def _feed_call(self, call: JsonCall, text: str, pieces: list[Piece]) -> str | None:
        read = call.feed(text)
        if read.pieces:
            self._prefix = ""
        pieces += read.pieces
        if read.broken is not None:
            self._give_up(read.broken, pieces)
        if read.rest is not None:
            self._call, self._expects_call = None, read.broken is None
        return read.rest

    def _give_up(self, text: str, pieces: list[Piece]) -> None:
        if self._prefix or text:
            pieces.append(Content(self._prefix + text))
        self._prefix = ""

    def _feed_text(self, text: str, pieces: list[Piece]) -> str | None:
        seen = self._marker.feed(text)
        if seen.before:
            pieces.append(Content(seen.before))
        if seen.after is not None:
            self._expects_call, self._prefix = True, TAG
        return seen.after
