"""Logprobs as JSON text, in OpenAI's two shapes and vLLM's.

A long prompt with many of them has megabytes of text: it is made token by token, in a thread, so that the
streams of others go on. The models of these shapes are in responses.py.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from services.core.logprobs import TokenLogprobs
from services.gateway.text.answer import ScoredPrompt, ScoredToken, TextDelta
from services.gateway.text.detokenizer import TokenBytes
from services.gateway.text.echo import offsets_in

T = TypeVar("T")
Fields = Mapping[str, str]  # of a JSON object: names and JSON text

LOGPROB_MIN = -9999.0  # what OpenAI gives for one that is not known
# Logprobs that are written on the event loop, in about five milliseconds, and what one has of JSON.
_AT_ONCE, _CHARACTERS = 2_000, 60


class LogprobsWriter(Protocol):
    """Of one response."""

    async def of_choices(self, deltas: Sequence[TextDelta]) -> list[Fields]:
        """Further fields of each delta's choice."""
        ...

    async def of_body(self, deltas: Sequence[TextDelta]) -> Fields:
        """Further fields of the body."""
        ...


class ChatLogprobsWriter:
    def __init__(self, token_bytes: TokenBytes, top: int | None, prompt_top: int | None) -> None:
        self._bytes, self._top, self._prompt_top = token_bytes, top, prompt_top

    async def of_choices(self, deltas: Sequence[TextDelta]) -> list[Fields]:
        return [await self._of_choice(delta.tokens) for delta in deltas]

    async def of_body(self, deltas: Sequence[TextDelta]) -> Fields:
        """vLLM has the prompt's beside the choices of a chat."""
        prompt = deltas[0].prompt if deltas else None
        if prompt is None or self._prompt_top is None:
            return {}
        return {"prompt_logprobs": await written_prompt(prompt, self._prompt_top, self._bytes)}

    async def _of_choice(self, tokens: Sequence[ScoredToken]) -> Fields:
        if self._top is None or not tokens:
            return {}
        content = await off_loop(len(tokens) * (self._top + 1), lambda: ",".join(map(self._token, tokens)))
        return {"logprobs": f'{{"content":[{content}],"refusal":null}}'}

    def _token(self, token: ScoredToken) -> str:
        scores = token.logprobs or TokenLogprobs(LOGPROB_MIN, 0)
        best = zip(scores.top_ids, scores.top_logprobs, strict=True)
        top = [self._entry(token_id, logprob) for token_id, logprob in best]
        return json.dumps({**self._entry(token.token_id, scores.logprob), "top_logprobs": top})

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        raw = self._bytes.of(token_id)
        return {"token": _text(raw), "logprob": logprob, "bytes": list(raw)}


@dataclass(frozen=True, slots=True)
class Columns:
    """What the lists of completions' logprobs have of some tokens, as JSON text without the brackets."""

    tokens: list[str]
    token_logprobs: list[str]
    top_logprobs: list[str]
    text_offset: list[str]

    def joined(self, after: "Columns") -> str:
        """The object with these and what comes after."""
        return f"{{{','.join(self._lists(after))}}}"

    def _lists(self, after: "Columns") -> Iterator[str]:
        for name in self.__dataclass_fields__:
            yield f'"{name}":{array([*getattr(self, name), *getattr(after, name)])}'


class CompletionLogprobsWriter:
    def __init__(
        self, token_bytes: TokenBytes, top: int | None, prompt_top: int | None, *, echoes: bool
    ) -> None:
        self._bytes, self._top, self._prompt_top, self._echoes = token_bytes, top, prompt_top, echoes
        self._prompts: dict[ScoredPrompt, Columns] = {}  # their choices share it
        self._written_prompts: dict[ScoredPrompt, str] = {}

    async def of_choices(self, deltas: Sequence[TextDelta]) -> list[Fields]:
        return [{**await self._logprobs(delta), **await self._prompt_logprobs(delta)} for delta in deltas]

    async def of_body(self, deltas: Sequence[TextDelta]) -> Fields:
        return {}

    async def _logprobs(self, delta: TextDelta) -> Fields:
        if self._top is None:
            return {}
        before = Columns([], [], [], [])
        if self._echoes and delta.prompt is not None:
            before = await self._prompt_columns(delta.prompt, self._top)
        if not delta.tokens and not before.tokens:
            return {}
        count = len(delta.tokens) * (self._top + 1)
        after = await off_loop(count, lambda: self._columns(delta.tokens))
        return {"logprobs": await off_loop(len(before.tokens), lambda: before.joined(after))}

    async def _prompt_columns(self, prompt: ScoredPrompt, top: int) -> Columns:
        if prompt not in self._prompts:
            count = len(prompt.token_ids) * (top + 1)
            self._prompts[prompt] = await off_loop(count, lambda: self._columns(self._tokens(prompt)))
        return self._prompts[prompt]

    async def _prompt_logprobs(self, delta: TextDelta) -> Fields:
        prompt = delta.prompt
        if prompt is None or self._prompt_top is None:
            return {}
        if prompt not in self._written_prompts:
            self._written_prompts[prompt] = await written_prompt(prompt, self._prompt_top, self._bytes)
        return {"prompt_logprobs": self._written_prompts[prompt]}

    def _tokens(self, prompt: ScoredPrompt) -> Iterator[ScoredToken]:
        """The prompt's tokens like those of an answer; the first has no logprobs."""
        offsets = offsets_in(prompt.text or "", prompt.token_ids, self._bytes)
        scores: Iterator[TokenLogprobs | None] = _scores_of(prompt)
        return map(ScoredToken, prompt.token_ids, offsets, scores)

    def _columns(self, tokens: "Sequence[ScoredToken] | Iterator[ScoredToken]") -> Columns:
        columns = Columns([], [], [], [])
        for token in tokens:
            text = self._text(token.token_id)
            columns.tokens.append(json.dumps(text))
            columns.text_offset.append(str(token.offset))
            scores = token.logprobs
            columns.token_logprobs.append("null" if scores is None else json.dumps(scores.logprob))
            columns.top_logprobs.append("null" if scores is None else json.dumps(self._best(text, scores)))
        return columns

    def _best(self, text: str, scores: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens, and the token itself; of some with one text the most probable one."""
        best: dict[str, float] = {}
        for token_id, logprob in zip(scores.top_ids[: self._top], scores.top_logprobs, strict=False):
            best.setdefault(self._text(token_id), logprob)
        best.setdefault(text, scores.logprob)
        return best

    def _text(self, token_id: int) -> str:
        """The older endpoint marks what is not text."""
        raw = self._bytes.of(token_id)
        return raw.decode() if _is_text(raw) else f"bytes:{_text(raw)}"


async def written_prompt(prompt: ScoredPrompt, top: int, token_bytes: TokenBytes) -> str:
    """vLLM's `prompt_logprobs`: for each token an object by token id, of the token itself and the best."""

    def one(token_id: int, scores: TokenLogprobs | None) -> str:
        if scores is None:
            return "null"
        entries = {token_id: (scores.logprob, scores.rank)}
        for place, (best, logprob) in enumerate(zip(scores.top_ids[:top], scores.top_logprobs, strict=False)):
            entries.setdefault(best, (logprob, place + 1))
        return json.dumps(
            {
                str(each): {
                    "logprob": logprob,
                    "rank": rank,
                    "decoded_token": token_bytes.of(each).decode(errors="replace"),
                }
                for each, (logprob, rank) in entries.items()
            }
        )

    def all_of_them() -> str:
        return array(list(map(one, prompt.token_ids, _scores_of(prompt))))

    return await off_loop(len(prompt.token_ids) * (top + 1), all_of_them)


def extended(json_object: str, fields: Fields) -> str:
    """A JSON object, which is not empty, with further fields. Megabytes of them are copied once."""
    pieces = [json_object[:-1] if fields else json_object]
    for name, text in fields.items():
        pieces += [f',"{name}":', text]
    return "".join([*pieces, "}"] if fields else pieces)


def array(items: Sequence[str]) -> str:
    """A JSON array of JSON values."""
    pieces = [piece for item in items for piece in (",", item)]
    return "".join(["[", *pieces[1:], "]"])


def ascii_json(text: str) -> str:
    """The same JSON without characters that a stream would look for in megabytes of logprobs."""
    return text if text.isascii() else json.dumps(json.loads(text))


def _scores_of(prompt: ScoredPrompt) -> Iterator[TokenLogprobs | None]:
    yield None
    for part in prompt.parts:
        yield from part.tokens()


def logprobs_in(fields: Fields) -> int:
    """About how many."""
    return sum(map(len, fields.values())) // _CHARACTERS


async def off_loop(logprobs: int, write: Callable[[], T]) -> T:
    """Write so many of them, in a thread if they are many. Others go on between those of two choices, of
    which an answer may have hundreds."""
    if logprobs > _AT_ONCE:
        return await asyncio.to_thread(write)
    if logprobs:
        await asyncio.sleep(0)
    return write()


def _text(raw: bytes) -> str:
    r"""A part of a character as OpenAI writes it: \xf0\x9f."""
    return raw.decode(errors="backslashreplace")


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
