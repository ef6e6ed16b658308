"""From token events to the text a client sees, and why each choice ended."""

from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from services.core.logprobs import TokenLogprobs
from services.core.sampling import FinishReason
from services.gateway.path.choices import Choices
from services.gateway.path.generation import Event
from services.gateway.path.journal import Journal
from services.gateway.text.detokenizer import Detokenizer
from services.gateway.text.stop import StopMatcher
from services.gateway.workers.worker_client import OutputToken


class ScoredToken(NamedTuple):
    token_id: int
    offset: int  # where its text begins in the choice's text, in characters
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str
    finish: FinishReason | None = None
    token_ids: tuple[int, ...] = ()  # since the choice's last delta; the text of the latest may be held back
    choice: int = 0
    tokens: tuple[ScoredToken, ...] = ()  # if logprobs were asked for: those whose text ends in this delta


def joined(deltas: Sequence[TextDelta]) -> TextDelta:
    """All deltas of one choice as one."""
    token_ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
    text = "".join(delta.text for delta in deltas)
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    return TextDelta(text, deltas[-1].finish, token_ids, deltas[-1].choice, tokens)


def by_choice(burst: Sequence[TextDelta]) -> Sequence[TextDelta]:
    """One delta of each choice that `burst` has deltas of, in the order of the first ones."""
    if len(burst) == 1:
        return burst
    deltas: defaultdict[int, list[TextDelta]] = defaultdict(list)
    for delta in burst:
        deltas[delta.choice].append(delta)
    return list(map(joined, deltas.values()))


class AnswerText:
    """One choice's tokens to text. Stop strings count from the `min_tokens`-th token on."""

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher, min_tokens: int) -> None:
        self._detokenizer, self._stops, self._min_tokens = detokenizer, stops, min_tokens
        self._token_ids: list[int] = []  # since the last delta

    def feed(self, token: OutputToken) -> TextDelta | None:
        """What `token` completes, if that is anything."""
        self._token_ids.append(token.token)
        text, finish = self._text(token)
        if not text and finish is None:
            return None
        token_ids, self._token_ids = tuple(self._token_ids), []
        return TextDelta(text, finish, token_ids, token.choice)

    def _text(self, token: OutputToken) -> tuple[str, FinishReason | None]:
        """A token that ends the answer by itself (EOS, a stop token) has no text."""
        text = "" if token.finish == "stop" else self._detokenizer.feed(token.token)
        if token.finish is not None:
            text += self._detokenizer.flush()
        if token.index + 1 < self._min_tokens:
            return text, token.finish
        found = self._stops.feed(text)
        if found.stopped:
            return found.text, "stop"
        held = self._stops.flush() if token.finish is not None else ""
        return found.text + held, token.finish


async def answer(
    bursts: AsyncGenerator[list[Event], None],
    texts: Sequence[AnswerText],
    choices: Choices,
    journal: Journal,
) -> AsyncGenerator[list[TextDelta], None]:
    """Bursts of deltas that are not empty; only the last one of each choice has a finish reason.

    The workers are let go before the last burst: a slow client does not hold them.
    """
    deltas: list[TextDelta] = []
    unfinished = set(range(len(texts)))
    async with aclosing(bursts):
        async for burst in bursts:
            deltas = []
            for event in burst:
                if isinstance(event, OutputToken) and event.choice not in unfinished:
                    continue  # it crossed the end that a stop string made
                journal.record(event)
                delta = texts[event.choice].feed(event) if isinstance(event, OutputToken) else None
                if delta is None:
                    continue
                deltas.append(delta)
                if delta.finish is not None:
                    choices.close(delta.choice)
                    unfinished.remove(delta.choice)
            if not unfinished:
                break
            if deltas:
                yield deltas
    assert not unfinished, "the events ended without a last token"
    yield deltas
