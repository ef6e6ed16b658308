"""One client's request in a chaos run: followed to its end or hung up on, and what is wrong with it."""

import asyncio
import itertools
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from tests.chaos.workload import Ask

# The gateway itself gives up a request for which it finds no room after 120 s.
HUNG_AFTER_S = 150.0


@dataclass(slots=True)
class Reply:
    """What has come of one answer."""

    ask: Ask
    sent_s: float
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    arrivals_s: list[float] = field(default_factory=list)  # of a stream's tokens
    end: Literal["completed", "hung_up", "failed"] = "failed"
    problem: str = ""  # why it failed

    @property
    def resumed(self) -> bool:
        return bool(self.timings) and self.timings["attempts"] > 1

    @property
    def first_token_s(self) -> float | None:
        return self.arrivals_s[0] - self.sent_s if self.arrivals_s else None

    @property
    def longest_pause(self) -> tuple[float, float]:
        """Its length in seconds, and the moment it began."""
        gaps = ((later - earlier, earlier) for earlier, later in itertools.pairwise(self.arrivals_s))
        return max(gaps, default=(0.0, 0.0))

    @property
    def usage_mistake(self) -> str:
        """Empty when usage counts the answer's tokens once each."""
        if self.end != "completed":
            return ""
        prompt, completion, total = (
            self.usage.get(f"{what}_tokens") for what in ("prompt", "completion", "total")
        )
        if completion != len(self.token_ids):
            return f"{completion} completion tokens counted, {len(self.token_ids)} received"
        if total != prompt + completion or self.usage["prompt_tokens_details"]["cached_tokens"] > prompt:
            return f"usage contradicts itself: {self.usage}"
        return ""

    def take(self, choice: dict[str, Any]) -> None:
        """One choice of a whole answer or of a chunk."""
        told = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        self.text += told.get("content") or ""
        self.token_ids += choice.get("token_ids") or []
        self.finish = choice["finish_reason"] or self.finish


class HungUp(Exception):
    """The client leaves, as it had planned."""


@dataclass(frozen=True, slots=True)
class Patience:
    """When a client hangs up: after a time, or after so many chunks; None: never."""

    seconds: float | None = None
    chunks: int | None = None

    @classmethod
    def draw(cls, rng: random.Random, share: float) -> "Patience":
        """The patience of one client, `share` of whom hang up."""
        if rng.random() >= share:
            return cls()
        return cls(chunks=rng.randint(1, 20)) if rng.random() < 0.6 else cls(seconds=rng.uniform(0.0, 3.0))


PATIENT = Patience()


async def follow(http: httpx.AsyncClient, ask: Ask, patience: Patience = PATIENT) -> Reply:
    """Never raises for what the server does: that is in the reply."""
    reply = Reply(ask, time.monotonic())
    try:
        async with asyncio.timeout(patience.seconds or HUNG_AFTER_S):
            await (_stream if ask.body.get("stream") else _whole)(http, reply, patience)
        reply.problem = _problem(reply)
        reply.end = "failed" if reply.problem else "completed"
    except HungUp:
        reply.end = "hung_up"
    except TimeoutError:
        reply.end = "failed" if patience.seconds is None else "hung_up"
        reply.problem = f"no end after {HUNG_AFTER_S:g} s" if patience.seconds is None else ""
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        reply.problem = f"{type(error).__name__}: {error}"
    return reply


async def _whole(http: httpx.AsyncClient, reply: Reply, _: Patience) -> None:
    response = await http.post(reply.ask.path, json=reply.ask.body)
    if response.status_code != httpx.codes.OK:
        raise ValueError(f"HTTP {response.status_code}: {response.text:.200}")
    answer = response.json()
    reply.take(answer["choices"][0])
    reply.usage, reply.timings = answer["usage"], answer["timings"]


async def _stream(http: httpx.AsyncClient, reply: Reply, patience: Patience) -> None:
    done = False
    async with http.stream("POST", reply.ask.path, json=reply.ask.body) as response:
        if response.status_code != httpx.codes.OK:
            raise ValueError(f"HTTP {response.status_code}: {await response.aread()!r:.200}")
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            done = done or data == "[DONE]"
            if data and not done:
                _take_chunk(reply, json.loads(data))
            if patience.chunks is not None and len(reply.arrivals_s) >= patience.chunks:
                raise HungUp
    if not done:
        raise ValueError("the stream ended without [DONE]")


def _take_chunk(reply: Reply, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        raise ValueError(f"in the stream: {chunk['error']['message']}")
    reply.usage, reply.timings = chunk.get("usage") or reply.usage, chunk.get("timings") or reply.timings
    for choice in chunk["choices"]:
        before = len(reply.token_ids)
        reply.take(choice)
        if len(reply.token_ids) > before:
            reply.arrivals_s.append(time.monotonic())


def _problem(reply: Reply) -> str:
    """What is wrong with an answer that says it is whole; empty if nothing is."""
    limit, tokens = reply.ask.body["max_tokens"], len(reply.token_ids)
    if reply.finish not in ("stop", "length"):
        return f"finish_reason is {reply.finish!r}"
    if not reply.ask.body.get("min_tokens", 1) <= tokens <= limit:
        return f"{tokens} tokens came, {reply.ask.body.get('min_tokens', 1)} to {limit} were asked for"
    if reply.finish == "length" and tokens != limit:
        return f"it ended for its length after {tokens} of {limit} tokens"
    if reply.finish == "stop" and reply.ask.body.get("ignore_eos"):
        return "it ended by itself although it was not to"
    return ""
