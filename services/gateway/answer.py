"""From token events to the text a client sees, and why it ended."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from services.core.sampling import FinishReason
from services.gateway.detokenizer import Detokenizer
from services.gateway.generation import Event
from services.gateway.journal import Journal
from services.gateway.stop import StopMatcher
from services.gateway.worker_client import OutputToken


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str
    finish: FinishReason | None = None
    token_ids: tuple[int, ...] = ()  # since the last delta; the text of the latest may be held back


class AnswerText:
    """One answer's tokens to text. Stop strings count from the `min_tokens`-th token on."""

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher, min_tokens: int) -> None:
        self._detokenizer, self._stops, self._min_tokens = detokenizer, stops, min_tokens

    def feed(self, token: OutputToken) -> TextDelta:
        """The text that `token` completes. A token that ends the answer by itself (EOS, a stop
        token) has no text."""
        text = "" if token.finish == "stop" else self._detokenizer.feed(token.token)
        if token.finish is not None:
            text += self._detokenizer.flush()
        if token.index + 1 < self._min_tokens:
            return TextDelta(text, token.finish)
        found = self._stops.feed(text)
        if found.stopped:
            return TextDelta(found.text, "stop")
        held = self._stops.flush() if token.finish is not None else ""
        return TextDelta(found.text + held, token.finish)


async def answer(
    events: AsyncGenerator[Event, None], text: AnswerText, journal: Journal
) -> AsyncGenerator[TextDelta, None]:
    """Deltas that are not empty; only the last one has a finish reason.

    The workers are let go before the last delta: a slow client does not hold them.
    """
    last: TextDelta | None = None
    token_ids: list[int] = []  # since the last delta
    async with aclosing(events):
        async for event in events:
            journal.record(event)
            if isinstance(event, OutputToken):
                token_ids.append(event.token)
                delta = replace(text.feed(event), token_ids=tuple(token_ids))
                if delta.finish is not None:
                    last = delta
                    break
                if delta.text:
                    token_ids = []
                    yield delta
    assert last is not None, "the events ended without a last token"
    yield last
