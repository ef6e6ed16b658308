"""What the clients of a chaos run ask: a pool of requests of every kind, drawn from a seed.

The pool is small and asked again and again, so that each request needs only one undisturbed answer to
be compared with.
"""

import random
from dataclasses import dataclass
from typing import Any

from loadtest.workload import SHARED_PREFIXES, STOP_STRINGS, WORDS
from tests.support.completions import MODEL

SHORT_WORDS = (2, 12)
LONG_WORDS = (100, 260)  # several prefill chunks of 128 tokens
LONG_SHARE = 0.35
TOKENS = (24, 96)
MIN_TOKENS = 12
ONE_TOKEN_SHARE = 0.08  # answered by the prefill worker alone
KINDS = ("greedy", "seeded", "unseeded")  # taken in turn
SEVERAL_EVERY = 4  # requests: one of them wants several choices. No multiple of the kinds: all have some
CHOICES_MAX = 4
CHAT_LOGPROBS = {"logprobs": True, "top_logprobs": 2}


@dataclass(frozen=True, slots=True)
class Ask:
    """`kind` is how it samples; an unseeded one has another answer each time."""

    number: int
    kind: str
    path: str
    body: dict[str, Any]

    @property
    def choices(self) -> int:
        return int(self.body.get("n", 1))

    def with_salt(self, salt: str) -> "Ask":
        """The same question for another tenant, who shares no cached block: the same answer."""
        return Ask(self.number, self.kind, self.path, self.body | {"cache_salt": salt})

    def with_seed(self, seed: int) -> "Ask":
        return Ask(self.number, "seeded", self.path, self.body | {"seed": seed})

    def for_one_token(self) -> "Ask":
        """The same prompt, for one token of one choice."""
        one = {"n": 1, "max_tokens": 1, "min_tokens": 1}
        return Ask(self.number, self.kind, self.path, self.body | one)


def draw_pool(count: int, rng: random.Random) -> list[Ask]:
    return [_draw(number, KINDS[number % len(KINDS)], rng) for number in range(count)]


def _draw(number: int, kind: str, rng: random.Random) -> Ask:
    max_tokens = 1 if rng.random() < ONE_TOKEN_SHARE else rng.randint(*TOKENS)
    body = {
        "model": MODEL,
        "max_tokens": max_tokens,
        "timings": True,
        "return_token_ids": True,
        **_sampling(kind, rng),
        **_limits(min(MIN_TOKENS, max_tokens), rng),
    }
    if number % SEVERAL_EVERY == SEVERAL_EVERY - 1:
        body["n"] = rng.randint(2, CHOICES_MAX)
    if rng.random() < 0.8:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    prompt = _prompt(rng)
    if rng.random() < 0.7:
        return Ask(number, kind, "/v1/completions", body | {"prompt": prompt, "logprobs": 2})
    messages = [{"role": "user", "content": prompt}]
    return Ask(number, kind, "/v1/chat/completions", body | {"messages": messages} | CHAT_LOGPROBS)


def _sampling(kind: str, rng: random.Random) -> dict[str, Any]:
    penalties: dict[str, Any] = rng.choice(
        [{}, {}, {"repetition_penalty": 1.2}, {"presence_penalty": 0.6, "frequency_penalty": 0.4}]
    )
    if kind == "greedy":
        return {"temperature": 0, **penalties}
    filters: dict[str, Any] = rng.choice([{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}])
    seed = {"seed": rng.getrandbits(31)} if kind == "seeded" else {}
    return {"temperature": round(rng.uniform(0.5, 1.2), 2), **filters, **penalties, **seed}


def _limits(min_tokens: int, rng: random.Random) -> dict[str, Any]:
    """What may end the answer before its last token, or keep it from ending."""
    stops = {"stop": rng.sample(STOP_STRINGS, 2), "min_tokens": min_tokens}
    whole = {"ignore_eos": True}
    return rng.choice([whole, whole, {"min_tokens": min_tokens}, stops])


def _prompt(rng: random.Random) -> str:
    prefix = rng.choice(("", *SHARED_PREFIXES))
    least, most = LONG_WORDS if rng.random() < LONG_SHARE else SHORT_WORDS
    return prefix + " ".join(rng.choices(WORDS, k=rng.randint(least, most)))
