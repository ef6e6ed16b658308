"""What a mixed load consists of: requests of many kinds, drawn from a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# Long enough that several prompts share whole KV blocks, short enough for a small cluster.
SHARED_PREFIXES = (
    "You are a careful assistant. Answer in plain words, be brief, and say so when you do not know. ",
    "The following is a conversation between a traveller and a guide who knows every town by heart. ",
    "Translate what follows into French, keep the tone, and do not explain your choices. ",
)
WORDS = (
    *("river", "mountain", "paper", "engine", "window", "garden", "letter", "music", "number", "island"),
    *("winter", "candle", "bridge", "forest", "market", "silver", "shadow", "border", "signal", "copper"),
    *("Straße", "été", "Übung", "東京", "привет"),
)
STOP_STRINGS = ("\n", ". ", " the", "e ")
PROMPT_WORDS = (1, 12)
LONG_PROMPT_WORDS = (60, 120)
LONG_SHARE = 0.15
MAX_TOKENS = 64
CANCEL_DELAY_S_MAX = 0.5


@dataclass(frozen=True, slots=True)
class CancelPlan:
    """When the client hangs up: after a time before the answer's first byte, or after some chunks."""

    after_s: float | None = None
    after_chunks: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    path: str
    body: dict[str, Any]
    cancel: CancelPlan | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def kind(self) -> str:
        endpoint = "chat" if "messages" in self.body else "completion"
        return f"{endpoint}, {'streamed' if self.streams else 'whole'}"


def mixed_calls(model: str, requests: int, cancel_share: float, seed: int) -> Iterator[Call]:
    """`requests` calls; the same arguments give the same calls."""
    rng = random.Random(seed)
    for _ in range(requests):
        stream = rng.random() < 0.5
        body: dict[str, Any] = {"model": model, "max_tokens": rng.randint(1, MAX_TOKENS), **_sampling(rng)}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if rng.random() < 0.3:
            body["stop"] = rng.sample(STOP_STRINGS, rng.randint(1, 2))
        prompt = _prompt(rng)
        cancel = _cancel_plan(rng, stream) if rng.random() < cancel_share else None
        if rng.random() < 0.5:
            yield Call("/v1/completions", body | {"prompt": prompt}, cancel)
        else:
            messages = [{"role": "user", "content": prompt}]
            yield Call("/v1/chat/completions", body | {"messages": messages}, cancel)


def _sampling(rng: random.Random) -> dict[str, Any]:
    """Greedy, or one of several ways to sample, half of them with a seed."""
    if rng.random() < 0.4:
        return {"temperature": 0}
    sampling: dict[str, Any] = {"temperature": round(rng.uniform(0.3, 1.5), 2)}
    sampling |= rng.choice([{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"presence_penalty": 0.5}])
    return sampling | ({"seed": rng.getrandbits(31)} if rng.random() < 0.5 else {})


def _prompt(rng: random.Random) -> str:
    prefix = rng.choice(("", *SHARED_PREFIXES))
    least, most = LONG_PROMPT_WORDS if rng.random() < LONG_SHARE else PROMPT_WORDS
    return prefix + " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def _cancel_plan(rng: random.Random, stream: bool) -> CancelPlan:
    if stream and rng.random() < 0.6:
        return CancelPlan(after_chunks=rng.randint(1, 20))
    return CancelPlan(after_s=rng.uniform(0.0, CANCEL_DELAY_S_MAX))
