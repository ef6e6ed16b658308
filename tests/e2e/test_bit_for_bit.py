"""A request's answer, logprobs and all, is one and the same to the last bit: whichever workers compute it,
whatever else they compute, and whoever of them dies meanwhile."""

import asyncio
from typing import Any

import httpx
import pytest

from tests.support.cluster import RunningCluster
from tests.support.completions import greedy
from tests.support.kernels import scores

LONG = [n * 7919 % 40_000 + 100 for n in range(900)]  # several chunks
TOKENS = 80  # decoding goes on for long enough to be disturbed
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 5}
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": greedy("The two panels of a diptych", TOKENS),
    "long prompt": greedy(LONG, TOKENS),
    "long prompt, another end": greedy([*LONG[:600], *LONG[:50]], TOKENS),
    "sampled": greedy("Once upon a time", TOKENS) | SAMPLED,
    "penalized": greedy("A list of colours: red,", TOKENS)
    | SAMPLED
    | {"top_k": 40, "repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {"260": -2}},
    "several choices": greedy(LONG[:150], TOKENS) | SAMPLED | {"n": 3},
    "grammar": greedy("A number:", TOKENS) | SAMPLED | {"guided_regex": "[0-9a-f]{100}"},
    "prompt scored": greedy(LONG[100:500], TOKENS) | {"prompt_logprobs": 2},
}


async def choices(http: httpx.AsyncClient, body: dict[str, Any], salt: str) -> tuple[list[Any], int]:
    """All that is told of them, and in how many attempts they were computed."""
    response = await http.post("/v1/completions", json=body | scores() | {"cache_salt": salt})
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"], answer["timings"]["attempts"]


@pytest.mark.skipif(not scores(), reason="without 8-bit weights the last bits depend on the batch")
@pytest.mark.parametrize("name", REQUESTS)
async def test_a_decode_worker_alone_gives_the_same_bits_as_both(
    split: RunningCluster, alone: RunningCluster, name: str
) -> None:
    async with split.http() as both, alone.http() as lonely:
        body = REQUESTS[name] | {"max_tokens": 24}
        answers = [await choices(http, body, "bits") for http in (both, lonely, lonely)]
    assert answers[0] == answers[1]
    assert answers[1] == answers[2], "from its own prefix cache, too"


async def test_a_crowd_of_which_workers_die_gets_the_same_bits_as_each_alone(
    two_and_two: RunningCluster,
) -> None:
    """Everybody asks twice at once; a decode worker dies while they stream, then a prefill worker."""
    cluster = two_and_two
    async with cluster.http() as http:
        expected = {name: (await choices(http, body, "alone"))[0] for name, body in REQUESTS.items()}
        attempts = 0
        for victim, kind in (("decode-0", "decode"), ("prefill-0", "prefill")):
            crowd = [
                (name, asyncio.create_task(choices(http, body, f"{victim} {copy}")))
                for copy in range(2)
                for name, body in REQUESTS.items()
            ]
            await cluster.until_computing(victim, kind)
            cluster.processes()[victim].kill()
            for name, asking in crowd:
                answer, tried = await asking
                attempts = max(attempts, tried)
                assert answer == expected[name], f"{name}, while {victim} died"
    assert attempts > 1, "nobody was disturbed"
    await cluster.await_quiet(timeout_s=60)
