"""From token events to the text a client sees, and why each choice ended."""

from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.core.sampling import FinishReason
from services.gateway.path.choices import Choices
from services.gateway.path.generation import Event
from services.gateway.path.journal import Journal
from services.gateway.text.detokenizer import Detokenizer
from services.gateway.text.stop import StopMatcher
from services.gateway.text.tool_calls.call_delta import AnswerEnd, CallDelta, joined_calls
from services.gateway.workers.worker_client import OutputToken


class ScoredToken(NamedTuple):
    token_id: int
    offset: int  # where its text begins in the choice's text, in characters
    logprobs: TokenLogprobs | None  # None: the worker is too old to tell


@dataclass(frozen=True, slots=True, eq=False)
class ScoredPrompt:
    """A prompt with the logprobs of its tokens from the second one on, in parts. Shared by its choices."""

    token_ids: Sequence[int]
    text: str | None  # if the answers begin with it
    parts: Sequence[PromptLogprobs]


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str
    finish: AnswerEnd | None = None
    token_ids: tuple[int, ...] = ()  # since the choice's last delta; the text of the latest may be held back
    choice: int = 0
    tokens: tuple[ScoredToken, ...] = ()  # if logprobs were asked for: those whose text ends in this delta
    prompt: ScoredPrompt | None = None  # in a choice's first delta, if the prompt's logprobs were asked for
    calls: tuple[CallDelta, ...] = ()  # of tools, which are no part of the text


def joined(deltas: Sequence[TextDelta]) -> TextDelta:
    """All deltas of one choice as one."""
    token_ids = tuple(token_id for delta in deltas for token_id in delta.token_ids)
    text = "".join(delta.text for delta in deltas)
    tokens = tuple(token for delta in deltas for token in delta.tokens)
    calls = joined_calls(call for delta in deltas for call in delta.calls)
    last, prompt = deltas[-1], deltas[0].prompt
    return TextDelta(text, last.finish, token_ids, last.choice, tokens, prompt, calls)


def by_choice(burst: Sequence[TextDelta]) -> Sequence[TextDelta]:
    """One delta of each choice that `burst` has deltas of, in the order of the first ones."""
    if len(burst) == 1:
        return burst
    deltas: defaultdict[int, list[TextDelta]] = defaultdict(list)
    for delta in burst:
        deltas[delta.choice].append(delta)
    return list(map(joined, deltas.values()))


class TokenText(Protocol):
    """One choice's tokens to text."""

    def feed(self, token: OutputToken) -> TextDelta | None:
        """What `token` completes, if that is anything."""
        ...


class AnswerText:
    """Stop strings count from the `min_tokens`-th token on. `ends`: the tokens that end the answer by
    themselves; a grammar may end it with any other. None: there is no grammar."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopMatcher,
        min_tokens: int,
        *,
        shows_end: bool = False,
        ends: frozenset[int] | None = None,
    ) -> None:
        self._detokenizer, self._stops, self._min_tokens = detokenizer, stops, min_tokens
        self._shows_end, self._ends = shows_end, ends
        self._token_ids: list[int] = []  # since the last delta

    def feed(self, token: OutputToken) -> TextDelta | None:
        self._token_ids.append(token.token)
        text, finish = self._cut(token, self._decoded(token))
        if not text and finish is None:
            return None
        token_ids, self._token_ids = tuple(self._token_ids), []
        return TextDelta(text, finish, token_ids, token.choice)

    def _decoded(self, token: OutputToken) -> str:
        """A token that ends the answer by itself (EOS, a stop token) has no text, unless that is wanted."""
        is_end = token.finish == "stop" and (self._ends is None or token.token in self._ends)
        hidden = is_end and not self._shows_end
        text = "" if hidden else self._detokenizer.feed(token.token)
        return text if token.finish is None else text + self._detokenizer.flush()

    def _cut(self, token: OutputToken, text: str) -> tuple[str, FinishReason | None]:
        """What may be shown after `text` was decoded, and whether the answer ends with it."""
        if token.index + 1 < self._min_tokens:
            return text, token.finish
        found = self._stops.feed(text)
        if found.stopped:
            return found.text, "stop"
        held = self._stops.flush() if token.finish is not None else ""
        return found.text + held, token.finish


class ScoredText(AnswerText):
    """With the logprobs of its tokens: a delta has those of the tokens whose text ends in it, the last one
    all that are left. The tokens of a stop string and the end token are among them, though not in the text.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopMatcher,
        min_tokens: int,
        *,
        shows_end: bool = False,
        ends: frozenset[int] | None = None,
        begin: int = 0,
    ) -> None:
        """`begin`: characters that the choice's text has before the answer."""
        super().__init__(detokenizer, stops, min_tokens, shows_end=shows_end, ends=ends)
        self._decoded_to = self._shown_to = begin
        self._waiting: deque[tuple[int, ScoredToken]] = deque()  # with the end of their text

    def feed(self, token: OutputToken) -> TextDelta | None:
        delta = super().feed(token)
        if delta is None:
            return None
        self._shown_to += len(delta.text)
        return replace(delta, tokens=tuple(self._shown(whole=delta.finish is not None)))

    def _decoded(self, token: OutputToken) -> str:
        begin, text = self._decoded_to, super()._decoded(token)
        self._decoded_to += len(text)
        self._waiting.append((self._decoded_to, ScoredToken(token.token, begin, token.logprobs)))
        return text

    def _shown(self, *, whole: bool) -> Iterator[ScoredToken]:
        while self._waiting and (whole or self._waiting[0][0] <= self._shown_to):
            yield self._waiting.popleft()[1]


class NoAnswer:
    """Of a request that wants only its prompt back: the one token that workers give at least is not shown."""

    def feed(self, token: OutputToken) -> TextDelta:
        return TextDelta("", "length", (), token.choice)


async def answer(
    bursts: AsyncGenerator[list[Event], None],
    texts: Sequence[TokenText],
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
