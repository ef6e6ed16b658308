"""Hermes, Qwen and all models without a format of their own: <tool_call>{...}</tool_call>."""

import uuid
from collections.abc import Collection, Sequence

from services.gateway.text.tool_calls.call_grammar import CallGrammar
from services.gateway.text.tool_calls.grammar_text import call_rules, json_call
from services.gateway.text.tool_calls.json_call import JsonCall
from services.gateway.text.tool_calls.marker import Marker
from services.gateway.text.tool_calls.piece import CallableTool, Content, Piece, Written

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesFormat:
    markers = (BEGIN, END)

    def parser(self, names: Collection[str]) -> "HermesParser":
        return HermesParser(names)

    def new_call_id(self) -> str:
        return new_call_id()

    def grammar(self, tools: Sequence[CallableTool], written: Written, *, parallel: bool) -> CallGrammar:
        return CallGrammar(
            rf'"\n" call "\n" {written(END)}',
            call_rules([json_call(tool, "arguments") for tool in tools]),
            begin=written(BEGIN),
            between=r'"\n"',
            parallel=parallel,
        )


class HermesParser:
    """Models forget the end marker, or what belongs in front of it: a call ends with its object."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._marker = Marker(BEGIN)
        self._call: JsonCall | None = None  # that is being written
        self._awaits_end = False
        self._held = ""  # after a call, as long as it may be the end marker

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        rest: str | None = text
        while rest:
            if self._call is not None:
                rest = self._feed_call(self._call, rest, pieces)
            elif self._awaits_end:
                rest = self._feed_end(rest)
            else:
                rest = self._feed_text(rest, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        """An end marker that did not come to its end is no content either."""
        texts = [self._marker.flush()]
        if self._call is not None and (held := self._call.flush()) is not None:
            texts.append(BEGIN + held)
        return [Content(text) for text in texts if text]

    def _feed_text(self, text: str, pieces: list[Piece]) -> str | None:
        seen = self._marker.feed(text)
        if seen.before:
            pieces.append(Content(seen.before))
        if seen.after is not None:
            self._call = JsonCall(self._names)
        return seen.after

    def _feed_call(self, call: JsonCall, text: str, pieces: list[Piece]) -> str | None:
        read = call.feed(text)
        pieces += read.pieces
        if read.broken is not None:
            pieces.append(Content(BEGIN + read.broken))
        if read.rest is not None:
            self._call, self._awaits_end = None, read.broken is None
        return read.rest

    def _feed_end(self, text: str) -> str | None:
        self._held += text
        wanted = self._held.lstrip()
        if END.startswith(wanted) and wanted != END:  # or it is empty
            return None
        rest, self._held, self._awaits_end = self._held, "", False
        return wanted.removeprefix(END) if wanted.startswith(END) else rest


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
