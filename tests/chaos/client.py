"""One client's request in a chaos run: followed to its end or hung up on."""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx

from tests.chaos.reply import Choice, Reply
from tests.chaos.workload import Ask

# The gateway itself gives up a request for which it finds no room after 120 s.
HUNG_AFTER_S = 150.0


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
    reply = Reply(ask, time.monotonic(), [Choice() for _ in range(ask.choices)])
    try:
        async with asyncio.timeout(patience.seconds or HUNG_AFTER_S):
            await (_stream if ask.body.get("stream") else _whole)(http, reply, patience)
        reply.problem = reply.mistakes()
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
    for told in answer["choices"]:
        reply.choices[told["index"]].take(told)
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
            if patience.chunks is not None and reply.chunks >= patience.chunks:
                raise HungUp
    if not done:
        raise ValueError("the stream ended without [DONE]")


def _take_chunk(reply: Reply, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        raise ValueError(f"in the stream: {chunk['error']['message']}")
    reply.usage, reply.timings = chunk.get("usage") or reply.usage, chunk.get("timings") or reply.timings
    for told in chunk["choices"]:
        reply.choices[told["index"]].take_chunk(told)
