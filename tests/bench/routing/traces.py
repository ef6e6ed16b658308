"""Requests to replay: recorded traces (see --data) and a uniform one, cut into windows of a given rate.

Prompts are token ids made so that two of them share exactly the leading blocks that the trace says are
equal. The traces come from machines with larger models and faster steps: their lengths are divided to fit
the measured model, whose context is 8,192 tokens, and their times are stretched to the wanted rate.
"""

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

CONTEXT_TOKENS_MAX = 8192  # of the measured model: requests beyond are left out
MOONCAKE_BLOCK = 512  # tokens of the trace that share one id
MOONCAKE_TICK_S = 3.0  # its times are multiples of this
UNIFORM_REQUESTS = 20_000
_PRIVATE_IDS = 1 << 24  # token ids from here on are of prompts that share nothing


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float
    prompt_tokens: int
    answer_tokens: int
    content: tuple[
        int, ...
    ]  # one id per block of the prompt, the last perhaps partial: equal ids, equal tokens

    def prompt_ids(self, block_size: int) -> list[int]:
        ids = [token for block in self.content for token in (block,) * block_size]
        return ids[: self.prompt_tokens]


@dataclass(frozen=True, slots=True)
class Trace:
    """`requests` are ordered by time."""

    name: str
    block_size: int  # tokens
    requests: tuple[Request, ...]

    def window(self, count: int, rate: float, rng: random.Random) -> list[Request]:
        """`count` requests in a row from a random place, with `rate` of them a second on average."""
        count = min(count, len(self.requests))
        start = rng.randrange(len(self.requests) - count + 1)
        window = self.requests[start : start + count]
        begin_s, end_s = window[0].at_s, window[-1].at_s
        stretch = (count - 1) / rate / (end_s - begin_s) if end_s > begin_s else 0.0
        return [replace(request, at_s=(request.at_s - begin_s) * stretch) for request in window]


def mooncake(folder: Path, rng: random.Random, divide: int = 16) -> Trace:
    """A conversation service's requests and which prefixes they share. One id of the trace is one block."""
    block_size = MOONCAKE_BLOCK // divide
    requests = []
    with _opened(folder / "mooncake_conversation.jsonl") as lines:
        for line in lines:
            row = json.loads(line)
            prompt_tokens = max(1, row["input_length"] // divide)
            requests.append(
                Request(
                    row["timestamp"] / 1e3,
                    prompt_tokens,
                    max(2, row["output_length"] // divide),
                    tuple(row["hash_ids"][: -(-prompt_tokens // block_size)]),
                )
            )
    return Trace("mooncake", block_size, spread(requests, MOONCAKE_TICK_S, rng))


def azure(folder: Path, kind: str, divide: int, block_size: int = 32) -> Trace:
    """`kind`: conv or code. Nothing is known of shared prefixes, so there are none."""
    with _opened(folder / f"azure_2023_{kind}.csv") as lines:
        rows = list(csv.DictReader(lines))
    requests = [
        private_request(
            number,
            datetime.fromisoformat(row["TIMESTAMP"]).timestamp(),
            max(1, int(row["ContextTokens"]) // divide),
            max(2, int(row["GeneratedTokens"]) // divide),
            block_size,
        )
        for number, row in enumerate(rows)
    ]
    return Trace(f"azure {kind}", block_size, _fitting(sorted(requests, key=lambda request: request.at_s)))


def uniform(rng: random.Random, block_size: int = 32) -> Trace:
    """Poisson arrivals, prompts of 64 to 1,024 tokens that share nothing, answers of 8 to 64."""
    at_s, requests = 0.0, []
    for number in range(UNIFORM_REQUESTS):
        at_s += rng.expovariate(1.0)
        prompt_tokens, answer_tokens = rng.randint(64, 1024), rng.randint(8, 64)
        requests.append(private_request(number, at_s, prompt_tokens, answer_tokens, block_size))
    return Trace("uniform", block_size, tuple(requests))


def private_request(
    number: int, at_s: float, prompt_tokens: int, answer_tokens: int, block_size: int
) -> Request:
    """One that shares no block with any other: its first block differs, and so do all that follow."""
    content = (_PRIVATE_IDS + number,) * -(-prompt_tokens // block_size)
    return Request(at_s, prompt_tokens, answer_tokens, content)


def spread(requests: Sequence[Request], tick_s: float, rng: random.Random) -> tuple[Request, ...]:
    """Times that were rounded down to `tick_s` get back a random part of it."""
    moved = [replace(request, at_s=request.at_s + rng.uniform(0.0, tick_s)) for request in requests]
    return _fitting(sorted(moved, key=lambda request: request.at_s))


def _fitting(requests: Sequence[Request]) -> tuple[Request, ...]:
    return tuple(r for r in requests if r.prompt_tokens + r.answer_tokens <= CONTEXT_TOKENS_MAX)


def _opened(path: Path):  # type: ignore[no-untyped-def]
    try:
        return path.open(newline="")
    except OSError as error:
        raise SystemExit(
            f"cannot read the trace {path}: {error}\n--data names the folder of the traces"
        ) from error


# What each trace is divided by is chosen so that a prompt takes seconds at most, as it does where such
# traces come from, and that four decode workers carry the answers of four busy prefill workers.
TRACES: dict[str, Callable[[Path, random.Random], Trace]] = {
    "mooncake": lambda folder, rng: mooncake(folder, rng),
    "azure-conv": lambda folder, rng: azure(folder, "conv", divide=2),
    "azure-code": lambda folder, rng: azure(folder, "code", divide=2),
    "uniform": lambda folder, rng: uniform(rng),
}
