"""Requests of the end-to-end tests, with the token ids of their answers."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    text: str
    usage: dict[str, Any]
    timings: dict[str, Any]
    logprobs: tuple[Any, ...] = ()  # if asked for: of each token, its own and those of the likeliest


def logprobs_of(choice: dict[str, Any]) -> list[Any]:
    """What a completion's choice, or a chunk's, says of its tokens; empty if that was not asked for."""
    told = choice["logprobs"]
    return list(zip(told["token_logprobs"], told["top_logprobs"], strict=True)) if told else []


def greedy(prompt: Sequence[int] | str, max_tokens: int) -> dict[str, Any]:
    """The body of a completion with exactly `max_tokens` tokens, the likeliest ones."""
    return {
        "model": MODEL,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "timings": True,
    }


async def complete(http: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    choice = answer["choices"][0]
    return Answer(
        tuple(choice["token_ids"]),
        choice["text"],
        answer["usage"],
        answer["timings"],
        tuple(logprobs_of(choice)),
    )


async def chunks(
    http: httpx.AsyncClient, body: dict[str, Any], path: str = "/v1/completions"
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a streamed answer as they come, its usage in the last one.

    Fails when the stream breaks off: no error may reach the client, and [DONE] is the last event.
    """
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    done = False
    async with http.stream("POST", path, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            done = done or data == "[DONE]"
            if data and not done:
                chunk = json.loads(data)
                assert "error" not in chunk, chunk
                yield chunk
    assert done, "the stream ended without [DONE]"


async def first_chunks(http: httpx.AsyncClient, body: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The first chunks of a streamed answer; then the client hangs up."""
    received: list[dict[str, Any]] = []
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line:
                received.append(json.loads(line.removeprefix("data: ")))
            if len(received) == count:
                break
    return received
