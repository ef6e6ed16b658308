"""The load client tells a good answer from a bad one, and hangs up when it had planned to."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from loadtest.call import Outcome, perform
from loadtest.workload import Call, CancelPlan

WHOLE = Call("/v1/completions", {"prompt": "a", "max_tokens": 2}, None)
STREAM = Call("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True}, None)
TOKENS = [{"choices": [{"text": text, "finish_reason": end}]} for text, end in (("a", None), ("b", "length"))]
USAGE = {"choices": [], "usage": {"completion_tokens": 2}}


def answer(finish: str | None = "length", tokens: int = 2) -> httpx.Response:
    choice = {"text": "ab", "finish_reason": finish}
    return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": tokens}})


def events(*chunks: object, done: bool = True) -> httpx.Response:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"] * done
    return httpx.Response(200, text="".join(lines))


async def outcome(call: Call, response: httpx.Response) -> Outcome:
    async with httpx.AsyncClient(
        base_url="http://server", transport=httpx.MockTransport(lambda request: response)
    ) as http:
        return await perform(http, call)


async def test_a_whole_answer_is_completed_with_its_tokens() -> None:
    assert await outcome(WHOLE, answer()) == Outcome("completion, whole", "completed", status=200, tokens=2)


async def test_a_line_ends_at_a_newline_and_at_no_other_character() -> None:
    text = [{"choices": [{"text": "a\u2028b\x85c", "finish_reason": end}]} for end in (None, "length")]
    lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in (*text, USAGE)]
    response = httpx.Response(200, content="".join([*lines, "data: [DONE]\n\n"]).encode())
    assert (await outcome(STREAM, response)).end == "completed"


async def test_a_refusal_says_when_to_come_again() -> None:
    refusal = httpx.Response(429, headers={"Retry-After": "7"}, text="later")
    for call in (WHOLE, STREAM):
        seen = await outcome(call, refusal)
        assert (seen.end, seen.status, seen.retry_after_s) == ("failed", 429, 7)


async def test_a_stream_is_completed_with_times() -> None:
    seen = await outcome(STREAM, events(*TOKENS, USAGE))
    assert (seen.end, seen.tokens, len(seen.gaps_s)) == ("completed", 2, 1)
    assert seen.first_token_s is not None


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        (httpx.Response(429, text="later"), "HTTP 429: later"),
        (answer(finish=None), "finish_reason is None"),
        (answer(tokens=3), "3 tokens were counted"),
        (answer(tokens=1), "ended for its length after 1 of 2"),
        (httpx.Response(200, text="no JSON"), "JSONDecodeError"),
        (httpx.Response(200, json={"choices": []}), "IndexError"),
    ],
)
async def test_a_bad_whole_answer_is_failed_with_the_reason(response: httpx.Response, problem: str) -> None:
    seen = await outcome(WHOLE, response)
    assert seen.end == "failed"
    assert problem in seen.problem


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        (httpx.Response(503, text="no worker"), "HTTP 503: no worker"),
        (events(*TOKENS, USAGE, done=False), "without [DONE]"),
        (events(TOKENS[0], {"error": {"message": "broken"}}, done=False), "in the stream: broken"),
        (events(TOKENS[0], USAGE), "finish_reason is None"),
        (events(*TOKENS), "0 tokens were counted"),
    ],
)
async def test_a_bad_stream_is_failed_with_the_reason(response: httpx.Response, problem: str) -> None:
    seen = await outcome(STREAM, response)
    assert seen.end == "failed"
    assert problem in seen.problem


async def test_a_client_hangs_up_after_the_planned_chunk_and_the_server_sees_it() -> None:
    closed = asyncio.Event()

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                yield f"data: {json.dumps(TOKENS[0])}\n\n".encode()
                await asyncio.sleep(0)

        async def aclose(self) -> None:
            closed.set()

    call = Call(STREAM.path, STREAM.body, CancelPlan(after_chunks=3))
    seen = await outcome(call, httpx.Response(200, stream=Endless()))
    assert seen == Outcome("completion, streamed", "cancelled")
    assert closed.is_set()


@pytest.mark.parametrize("call", [WHOLE, STREAM], ids=["whole", "stream"])
async def test_a_client_hangs_up_before_the_first_byte(call: Call) -> None:
    async def silence(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets the event")

    planned = Call(call.path, call.body, CancelPlan(after_s=0.01))
    async with httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(silence)) as http:
        assert (await perform(http, planned)).end == "cancelled"


async def test_a_stream_that_began_is_not_hung_up_on_by_the_clock() -> None:
    class Slow(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for chunk in (*TOKENS, USAGE):
                yield f"data: {json.dumps(chunk)}\n\n".encode()
                await asyncio.sleep(0.2)
            yield b"data: [DONE]\n\n"

    call = Call(STREAM.path, STREAM.body, CancelPlan(after_s=0.4))
    assert (await outcome(call, httpx.Response(200, stream=Slow()))).end == "completed"
