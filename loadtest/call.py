"""One request of a load: sent, followed to its end, or hung up on; measured as its client sees it."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from loadtest.workload import Call, CancelPlan

End = Literal["completed", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`first_token_s` and `gaps_s` are known for streams only: one chunk carries about one token."""

    kind: str
    end: End
    problem: str = ""  # why it failed
    status: int = 0  # of the response; 0: none came
    retry_after_s: int | None = None  # what a refusal says
    tokens: int = 0
    first_token_s: float | None = None
    gaps_s: tuple[float, ...] = ()


class HungUp(Exception):
    """The client leaves, as it had planned."""


async def perform(http: httpx.AsyncClient, call: Call) -> Outcome:
    """Never raises for what the server does: that is the outcome."""
    plan = call.cancel or CancelPlan()
    try:
        async with asyncio.timeout(plan.after_s) as patience:
            if call.streams:
                return await _stream(http, call, plan, patience)
            return await _whole(http, call)
    except (TimeoutError, HungUp):
        return Outcome(call.kind, "cancelled")
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        return Outcome(call.kind, "failed", f"{type(error).__name__}: {error}")


async def _whole(http: httpx.AsyncClient, call: Call) -> Outcome:
    response = await http.post(call.path, json=call.body, headers=call.headers)
    if response.status_code != httpx.codes.OK:
        return _refused(call, response)
    answer = response.json()
    problem = _problem(call, answer["choices"][0]["finish_reason"], answer["usage"])
    end: End = "failed" if problem else "completed"
    return Outcome(call.kind, end, problem, response.status_code, tokens=_tokens(answer["usage"]))


async def _stream(
    http: httpx.AsyncClient, call: Call, plan: CancelPlan, patience: asyncio.Timeout
) -> Outcome:
    sent_s = time.perf_counter()
    arrivals: list[float] = []
    finish: str | None = None
    usage: dict[str, Any] = {}
    done = False
    async with http.stream("POST", call.path, json=call.body, headers=call.headers) as response:
        if response.status_code != httpx.codes.OK:
            await response.aread()
            return _refused(call, response)
        async for line in _lines(response):
            if not line:
                continue
            patience.reschedule(None)  # the first byte has come
            data = line.removeprefix("data: ")
            done = done or data == "[DONE]"
            chunk = {} if done else json.loads(data)
            if "error" in chunk:
                problem = f"in the stream: {chunk['error']['message']}"
                return Outcome(call.kind, "failed", problem, response.status_code)
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", ()):
                arrivals += [time.perf_counter()] if _has_text(choice) else []
                finish = choice["finish_reason"] or finish
            if plan.after_chunks is not None and len(arrivals) >= plan.after_chunks:
                raise HungUp
    problem = _problem(call, finish, usage) if done else "the stream ended without [DONE]"
    return Outcome(
        call.kind,
        "failed" if problem else "completed",
        problem,
        response.status_code,
        None,
        _tokens(usage),
        arrivals[0] - sent_s if arrivals else None,
        tuple(later - earlier for earlier, later in itertools.pairwise(arrivals)),
    )


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """httpx's own splits at every character that Unicode calls a line's end, also within JSON."""
    rest = ""
    async for text in response.aiter_text():
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _has_text(choice: dict[str, Any]) -> bool:
    return bool(choice.get("text") or choice.get("delta", {}).get("content"))


def _refused(call: Call, response: httpx.Response) -> Outcome:
    retry_after = response.headers.get("Retry-After", "")
    return Outcome(
        call.kind,
        "failed",
        f"HTTP {response.status_code}: {response.text:.200}",
        response.status_code,
        int(retry_after) if retry_after.isdecimal() else None,
    )


def _problem(call: Call, finish: str | None, usage: dict[str, Any]) -> str:
    """What is wrong with an answer that says it is whole; empty if nothing is."""
    tokens, limit = _tokens(usage), int(call.body["max_tokens"])
    if finish not in ("stop", "length"):
        return f"finish_reason is {finish!r}"
    if not 1 <= tokens <= limit:
        return f"{tokens} tokens were counted, 1 to {limit} were asked for"
    if finish == "length" and tokens != limit:
        return f"it ended for its length after {tokens} of {limit} tokens"
    return ""


def _tokens(usage: dict[str, Any]) -> int:
    return int(usage.get("completion_tokens", 0))
