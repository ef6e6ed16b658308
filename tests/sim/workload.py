"""What the clients of a simulated cluster ask for, and what the answers must be.

The expected answer comes from a reference that knows no block, batch, worker or attempt: the arithmetic
model's definition, applied to the tokens one after the other.
"""

import random
import zlib
from array import array
from dataclasses import dataclass, field
from typing import Any

from services.core.sampling import SamplingParams
from services.engine.runner import arithmetic_token
from tests.sim.engine import VOCAB
from tests.sim.gateway import END_TOKEN, word
from tests.sim.worker import MODEL


@dataclass(slots=True)
class Expected:
    """One choice of an answer."""

    token_ids: list[int]
    text: str
    finish: str
    logprobs: list[float | None] = field(default_factory=list)  # if they are asked for


@dataclass(slots=True)
class Request:
    """One client: when it asks, what, and how it behaves."""

    name: str
    at_s: float
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    leaves_after_s: float | None = None
    read_s: float = 0.0

    @property
    def prompt(self) -> list[int]:
        return list(self.body["prompt"])

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


@dataclass(slots=True)
class Workload:
    rng: random.Random
    context_tokens: int
    prefixes: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        half = self.context_tokens // 2
        ranges = ((1, 20), (half // 4, half), (half // 2, half))
        self.prefixes = [self._tokens(self.rng.randint(*lengths)) for lengths in ranges]

    def requests(self, count: int, within_s: float) -> list[Request]:
        """Arrivals are independent of each other, with bursts."""
        times = sorted(self.rng.uniform(0.0, within_s) for _ in range(count))
        if self.rng.random() < 0.3:
            times = [self.rng.choice(times[:3]) if self.rng.random() < 0.5 else at for at in times]
        return [self._request(f"r{number}", at) for number, at in enumerate(sorted(times))]

    def _request(self, name: str, at_s: float) -> Request:
        rng = self.rng
        prompt = self._prompt()
        room = self.context_tokens - len(prompt)
        max_tokens = 1 if rng.random() < 0.1 else rng.randint(1, min(60, room))
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": rng.choice([0.0, 1.0]),
            "return_token_ids": True,
            "timings": True,
        }
        if rng.random() < 0.8:
            body["seed"] = rng.getrandbits(40)
        if rng.random() < 0.2:
            body["n"] = rng.randint(2, 4)
        if rng.random() < 0.3:
            body["stop_token_ids"] = rng.sample(range(VOCAB), 40)
            body["min_tokens"] = rng.randint(0, max_tokens)
        if rng.random() < 0.2:
            body["ignore_eos"] = True
        if rng.random() < 0.2:
            body["cache_salt"] = rng.choice(["tenant", "other"])
        if rng.random() < 0.2:
            body["priority"] = rng.choice([-1, 1])
        if rng.random() < 0.7:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if rng.random() < 0.2 and "seed" in body and "min_tokens" not in body:
            body["stop"] = word(rng.choice(answer(body, body["seed"], choice=0).token_ids))
        body |= _scores(body)
        return Request(
            name,
            at_s,
            body,
            {"authorization": f"Bearer {rng.choice('abc')}"} if rng.random() < 0.3 else {},
            leaves_after_s=rng.uniform(0.0, 3.0) if rng.random() < 0.12 else None,
            read_s=rng.uniform(0.0, 0.2) if rng.random() < 0.1 else 0.0,
        )

    def _prompt(self) -> list[int]:
        longest = self.context_tokens - 2
        shared = self.rng.choice(self.prefixes) if self.rng.random() < 0.6 else []
        own = self.rng.choice([1, 2, 8, 30, longest // 2, longest])
        return (shared + self._tokens(self.rng.randint(1, own)))[:longest]

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(count)]


def answer(body: dict[str, Any], seed: int, choice: int) -> Expected:
    """What a cluster must answer to `body`, whatever happens to it."""
    params = SamplingParams(max_tokens=body["max_tokens"], temperature=body["temperature"], seed=seed)
    ends = set(body.get("stop_token_ids", [])) | (set() if body.get("ignore_eos") else {END_TOKEN})
    keys = values = 0
    fresh = list(body["prompt"])
    tokens: list[int] = []
    text = "".join(map(word, fresh)) if body.get("echo") else ""
    begin, logprobs = len(text), _of_prompt(fresh) if "logprobs" in body and text else []
    while True:
        keys = zlib.crc32(array("i", fresh), keys)
        values = zlib.crc32(array("i", [-token for token in fresh]), values)
        token = arithmetic_token(keys, values, params, len(tokens), VOCAB, choice)
        tokens.append(token)
        logprobs += [_logprob(keys, token)] if "logprobs" in body else []
        fresh = [token]
        if token in ends and len(tokens) >= body.get("min_tokens", 0):
            return Expected(tokens, text, "stop", logprobs)
        text += word(token)
        if "stop" in body and (at := text.find(body["stop"], begin)) >= 0:
            return Expected(tokens, text[:at], "stop", logprobs)
        if len(tokens) == params.max_tokens:
            return Expected(tokens, text, "length", logprobs)


def _scores(body: dict[str, Any]) -> dict[str, Any]:
    """Some want logprobs and the prompt before the answer. What others ask for does not depend on it."""
    rng = random.Random(zlib.crc32(array("i", body["prompt"])))
    return ({"logprobs": rng.choice([0, 2])} if rng.random() < 0.3 else {}) | (
        {"echo": True} if rng.random() < 0.2 else {}
    )


def _logprob(keys: int, token: int) -> float:
    """As ArithmeticRunner has it."""
    return -(1 + (keys ^ token) % VOCAB) / 8


def _of_prompt(prompt: list[int]) -> list[float | None]:
    before = [zlib.crc32(array("i", prompt[:place])) for place in range(1, len(prompt))]
    return [None, *map(_logprob, before, prompt[1:])]
