"""Logprobs of prompt and answer are the same on every route, from the cache, and when a worker is killed.

Workers in this process, over real gRPC, with an arithmetic model that computes eight tokens of a prompt in
a step.
"""

import asyncio
from typing import Any

import pytest

from services.gateway.served_model import ServedModel
from tests.integration.test_killed_workers import Running
from tests.support.completions import MODEL
from tests.support.in_process_cluster import InProcessCluster, in_process_cluster

PROMPT = [n * 7919 % 40_000 + 100 for n in range(60)]
SCORED = {"logprobs": 2, "echo": True, "prompt_logprobs": 1, "n": 2, "temperature": 0.9, "seed": 3}


async def choices(cluster: InProcessCluster, **body: Any) -> Any:
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16, "ignore_eos": True, **SCORED, **body}
    answered = await cluster.http.post("/v1/completions", json=asked)
    assert answered.status_code == 200, answered.text
    return answered.json()["choices"]


@pytest.fixture(scope="module")
def right(model: ServedModel) -> Any:
    async def ask() -> Any:
        async with in_process_cluster(model, prefill=0, decode=1) as cluster:
            return await choices(cluster)

    return asyncio.run(ask())


def test_every_token_has_its_logprob(right: Any) -> None:
    for choice in right:
        assert [len(values) for values in choice["logprobs"].values()] == [len(PROMPT) + 16] * 4
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert [entries is None for entries in choice["prompt_logprobs"]] == [True] + [False] * 59
    assert right[0]["logprobs"] != right[1]["logprobs"]


@pytest.mark.parametrize("reuses", [False, True])
async def test_prefill_and_decode_worker_together_give_what_one_alone_gives(
    model: ServedModel, right: Any, reuses: bool
) -> None:
    async with in_process_cluster(model, prefill=1, decode=1) as cluster:
        if reuses:  # the prompt is cached on both
            await cluster.answer(prompt=PROMPT, max_tokens=4)
        assert await choices(cluster) == right
        usage = (await cluster.answer(prompt=PROMPT, max_tokens=4)).usage
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0  # what was scored is cached for others


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_killed_while_it_scores_the_prompt(
    model: ServedModel, right: Any, role: str, steps: int
) -> None:
    alone = {"prefill": 2, "decode": 2} if role == "prefill" else {"prefill": 0, "decode": 2}
    async with in_process_cluster(model, **alone) as cluster:
        running = Running(cluster, role, steps, asyncio.create_task(choices(cluster)))
        await running.kill()
        assert await running.answering == right


@pytest.mark.parametrize("steps", [1, 9])
async def test_a_worker_killed_while_it_decodes(model: ServedModel, right: Any, steps: int) -> None:
    async with in_process_cluster(model) as cluster:
        running = Running(cluster, "decode", steps, asyncio.create_task(choices(cluster)))
        await running.kill()
        assert await running.answering == right


async def test_without_an_answer_no_decode_worker_is_asked(model: ServedModel, right: Any) -> None:
    async with in_process_cluster(model, prefill=1, decode=1) as cluster:
        for choice, whole in zip(await choices(cluster, max_tokens=0), right, strict=True):
            assert choice["prompt_logprobs"] == whole["prompt_logprobs"]
            for name, values in choice["logprobs"].items():
                assert values == whole["logprobs"][name][: len(PROMPT)]
        assert cluster.workers["d0"].engine.engine.take_report().gauges.prompt_tokens == 0
