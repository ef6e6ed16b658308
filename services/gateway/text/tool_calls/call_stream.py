"""From an answer's text to its content and its tool calls."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from services.gateway.text.answer import TextDelta
from services.gateway.text.tool_calls.call_delta import AnswerEnd, CallDelta
from services.gateway.text.tool_calls.piece import Arguments, CallBegins, Content, Piece
from services.gateway.text.tool_calls.tool_use import ToolUse


async def with_calls(
    bursts: AsyncGenerator[list[TextDelta], None], use: ToolUse, choices: int
) -> AsyncGenerator[list[TextDelta], None]:
    """The same bursts of deltas, with the calls in their texts as CallDeltas. Closing it closes them."""
    streams = [CallStream(use) for _ in range(choices)]
    async with aclosing(bursts):
        async for burst in bursts:
            taken = [streams[delta.choice].feed(delta) for delta in burst]
            if visible := [delta for delta in taken if delta is not None]:
                yield visible


class CallStream:
    """One choice. Blanks around calls are not content, as models put line ends between them."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._parser = use.parser()
        self._calls = 0
        self._skips = False  # the call that comes now, because one was to be enough
        self._after_call = False
        self._blanks = ""  # content if more of it follows
        self._waiting: list[TextDelta] = []  # whose text is held back
        self._content = ""
        self._found: list[CallDelta] = []

    def feed(self, delta: TextDelta) -> TextDelta | None:
        """What `delta` brings the client, if that is anything; then with the tokens held back before."""
        pieces = self._parser.feed(delta.text)
        if delta.finish is not None:
            pieces += self._parser.flush()
        for piece in pieces:
            self._take(piece)
        if delta.finish is not None and not self._calls:
            self._content += self._blanks
        self._waiting.append(delta)
        if not self._content and not self._found and delta.finish is None:
            return None
        return self._taken(delta)

    def _taken(self, last: TextDelta) -> TextDelta:
        waiting, content, found = self._waiting, self._content, tuple(self._found)
        self._waiting, self._content, self._found = [], "", []
        return replace(
            last,
            text=content,
            finish=self._finish(last.finish),
            token_ids=tuple(token_id for delta in waiting for token_id in delta.token_ids),
            tokens=tuple(token for delta in waiting for token in delta.tokens),
            calls=found,
        )

    def _take(self, piece: Piece) -> None:
        match piece:
            case Content(text):
                self._take_content(text)
            case CallBegins(name):
                self._begin_call(name)
            case Arguments(text) if not self._skips:
                self._found.append(CallDelta(self._calls - 1, text))

    def _take_content(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            text = self._blanks + text
            content = text.rstrip()
            self._content += content
            self._blanks = text[len(content) :]

    def _begin_call(self, name: str) -> None:
        self._skips = self._calls > 0 and not self._use.parallel
        self._after_call, self._blanks = True, ""
        if not self._skips:
            self._found.append(CallDelta(self._calls, "", self._use.format.new_call_id(), name))
            self._calls += 1

    def _finish(self, finish: AnswerEnd | None) -> AnswerEnd | None:
        """As OpenAI does: who names a function knows that it is called, and gets the plain reason."""
        called = self._calls and self._use.choice != "named"
        return "tool_calls" if finish == "stop" and called else finish
