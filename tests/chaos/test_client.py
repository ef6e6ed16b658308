"""A client of a chaos run keeps the choices of an answer apart, whole or streamed."""

import json
from typing import Any

import httpx
import pytest

from tests.chaos.client import PATIENT, Patience, follow
from tests.chaos.reply import Reply
from tests.chaos.workload import Ask

USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 4,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 0},
}
EXTRAS = {"usage": USAGE, "timings": {"attempts": 1, "seed": 7}}


def told(index: int, text: str, token_id: int, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "token_ids": [token_id], "finish_reason": finish}


INTERLEAVED = [
    told(1, "c", 3, None),
    told(0, "a", 1, None),
    told(0, "b", 2, "length"),
    told(1, "", 4, "stop"),
]


async def streamed(choices: list[dict[str, Any]], patience: Patience = PATIENT) -> Reply:
    chunks = [*({"choices": [choice]} for choice in choices), {"choices": [], **EXTRAS}]
    lines = [*map(json.dumps, chunks), "[DONE]"]
    return await answered("".join(f"data: {line}\n\n" for line in lines), patience, stream=True)


async def answered(text: str, patience: Patience = PATIENT, **more: object) -> Reply:
    """What a client makes of a server that says `text`."""
    server = httpx.MockTransport(lambda request: httpx.Response(200, text=text))
    ask = Ask(0, "greedy", "/v1/completions", {"max_tokens": 2, "n": 2, **more})
    async with httpx.AsyncClient(transport=server, base_url="http://server") as http:
        return await follow(http, ask, patience)


def assert_whole(reply: Reply) -> None:
    assert (reply.end, reply.problem, reply.usage_mistake) == ("completed", "", "")
    first, second = reply.choices
    assert (first.token_ids, first.text, first.finish) == ([1, 2], "ab", "length")
    assert (second.token_ids, second.text, second.finish) == ([3, 4], "c", "stop")


async def test_the_chunks_of_a_stream_go_to_their_choices() -> None:
    assert_whole(await streamed(INTERLEAVED))


async def test_the_choices_of_a_whole_answer_are_told_apart() -> None:
    choices = [
        told(0, "ab", 1, "length") | {"token_ids": [1, 2]},
        told(1, "c", 3, "stop") | {"token_ids": [3, 4]},
    ]
    assert_whole(await answered(json.dumps({"choices": choices, **EXTRAS})))


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        (INTERLEAVED[:-1], "choice 1: finish_reason is None"),
        ([one for one in INTERLEAVED if one["index"] == 0], "choice 1: finish_reason is None"),
        ([*INTERLEAVED, told(2, "x", 9, "stop")], "IndexError"),
        ([*INTERLEAVED, told(0, "x", 9, "stop")], "choice 0 went on after its end"),
    ],
)
async def test_a_stream_that_lacks_a_choice_or_has_too_much_fails(
    choices: list[dict[str, Any]], problem: str
) -> None:
    reply = await streamed(choices)
    assert reply.end == "failed"
    assert problem in reply.problem


async def test_a_client_hangs_up_after_so_many_chunks_of_all_choices() -> None:
    reply = await streamed(INTERLEAVED, Patience(chunks=2))
    assert reply.end == "hung_up"
    assert [choice.token_ids for choice in reply.choices] == [[1], [3]]
