"""n > 1 with the real model through both workers: each choice its own tokens, one prefill, one transfer."""

import asyncio
from collections import defaultdict
from contextlib import aclosing
from typing import Any

import httpx
import openai

from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL, chunks, greedy, logprobs_of
from tests.support.kernels import scores

PROMPT = [n * 7919 % 40_000 + 100 for n in range(150)]  # nine full blocks of 16 tokens and a partial one
TOKENS = 40
KILL_AFTER = 30  # tokens of all choices
N = 3
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11}


def body(n: int, **more: object) -> dict[str, Any]:
    return greedy(PROMPT, TOKENS) | SAMPLED | scores() | {"n": n} | more


async def ask(http: httpx.AsyncClient, request: dict[str, Any]) -> dict[str, Any]:
    response = await http.post("/v1/completions", json=request)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    for choice in answer["choices"]:
        choice["scores"] = logprobs_of(choice)
    return answer


def token_ids(answer: dict[str, Any]) -> dict[int, list[int]]:
    return {choice["index"]: choice["token_ids"] for choice in answer["choices"]}


def token_scores(answer: dict[str, Any]) -> dict[int, list]:
    return {choice["index"]: choice["scores"] for choice in answer["choices"]}


async def moved(cluster: RunningCluster) -> dict[str, float]:
    """What has been computed and what has travelled so far, over all workers."""
    seen = (await cluster.worker_metrics()).values()
    return {
        "bytes": sum(one.value("diptych_transfer_bytes_total", direction="received") for one in seen),
        "leases": sum(one.value("diptych_worker_leases_ended_total", how="released") for one in seen),
        "prompt tokens": sum(one.value("diptych_worker_batch_tokens_sum", kind="prefill") for one in seen),
    }


async def cost(cluster: RunningCluster, http: httpx.AsyncClient, request: dict[str, Any]) -> dict[str, float]:
    """What one request adds to `moved`."""
    before = await moved(cluster)
    await ask(http, request)
    await cluster.await_quiet()
    after = await moved(cluster)
    return {name: after[name] - before[name] for name in before}


async def test_each_choice_has_the_tokens_that_a_decode_worker_alone_gives_it(split, alone) -> None:
    async with split.http() as http, alone.http() as lonely:
        both, one = await ask(http, body(N)), await ask(lonely, body(N))
        single = await ask(http, body(1))
    assert both["timings"]["prefill_worker"] == "prefill-0"
    assert one["timings"]["prefill_worker"] is None
    assert token_ids(both) == token_ids(one)
    assert token_scores(both) == token_scores(one)
    assert token_ids(both)[0] == token_ids(single)[0]
    assert len(set(map(tuple, token_ids(both).values()))) == N
    assert (both["usage"]["prompt_tokens"], both["usage"]["completion_tokens"]) == (len(PROMPT), N * TOKENS)


async def test_several_prompts_get_what_each_gets_alone(split, alone) -> None:
    prompts = [PROMPT, PROMPT[:40], PROMPT[20:60]]
    async with split.http() as http, alone.http() as lonely:
        both = token_ids(await ask(http, body(2, prompt=prompts)))
        one = token_ids(await ask(lonely, body(2, prompt=prompts)))
        each = [token_ids(await ask(http, body(2, prompt=prompt))) for prompt in prompts]
    assert both == one
    assert [both[index] for index in range(6)] == [choices[choice] for choices in each for choice in (0, 1)]


async def test_greedy_choices_are_equal(split) -> None:
    async with split.http() as http:
        found = token_ids(await ask(http, body(N, temperature=0)))
        single = token_ids(await ask(http, body(1, temperature=0)))
    assert list(found.values()) == [single[0]] * N


async def test_all_choices_together_cost_one_prefill_and_one_transfer(split) -> None:
    async with split.http() as http:
        single = await cost(split, http, body(1, cache_salt="single"))
        several = await cost(split, http, body(8, cache_salt="several"))
    print(f"one choice: {single}, eight: {several}")
    assert single["bytes"] > 0
    assert single["leases"] == 1
    assert several == single


async def test_the_openai_client_streams_all_choices(split) -> None:
    async with openai.AsyncOpenAI(base_url=f"{split.url}/v1", api_key="none", max_retries=0) as client:
        message = {"role": "user", "content": "Name a colour."}
        request = {"model": MODEL, "messages": [message], "n": N, "seed": 5, "max_tokens": 12}
        whole = await client.chat.completions.create(**request)
        text: defaultdict[int, str] = defaultdict(str)
        finishes: dict[int, str] = {}
        async for chunk in await client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                text[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    finishes[choice.index] = choice.finish_reason
    assert text == {choice.index: choice.message.content for choice in whole.choices}
    assert finishes == {choice.index: choice.finish_reason for choice in whole.choices}


async def test_a_stop_string_in_one_choice_leaves_the_others_as_they_were(split) -> None:
    async with split.http() as http:
        free = await ask(http, body(N))
        texts = [choice["text"] for choice in free["choices"]]
        stop = texts[1][20:26]
        assert not any(stop in text for text in (texts[0], texts[2]))
        stopped = await ask(http, body(N, stop=stop))
    assert [choice["text"] for choice in stopped["choices"]] == [
        texts[0],
        texts[1][: texts[1].index(stop)],
        texts[2],
    ]
    assert [choice["finish_reason"] for choice in stopped["choices"]] == ["length", "stop", "length"]


async def streamed(
    http: httpx.AsyncClient, request: dict[str, Any], reached: asyncio.Event
) -> dict[str, Any]:
    """The last chunk of a stream, with all tokens; `reached` is set in the middle of it."""
    found: defaultdict[int, dict[str, list]] = defaultdict(lambda: {"token_ids": [], "scores": []})
    last: dict[str, Any] = {}
    async with aclosing(chunks(http, request)) as stream:
        async for last in stream:
            for choice in last["choices"]:
                found[choice["index"]]["token_ids"] += choice["token_ids"]
                found[choice["index"]]["scores"] += logprobs_of(choice)
            if sum(len(choice["token_ids"]) for choice in found.values()) >= KILL_AFTER:
                reached.set()
    return last | {"choices": [{"index": index, **choice} for index, choice in sorted(found.items())]}


async def test_a_killed_decode_worker_changes_no_token_of_any_choice(two_and_two: RunningCluster) -> None:
    said = len(two_and_two.said)
    killed: list[str] = []
    reached = asyncio.Event()

    async def kill() -> None:
        await reached.wait()
        seen = await two_and_two.worker_metrics()
        decodes = {name: one for name, one in seen.items() if name.startswith("decode")}
        killed.append(max(decodes, key=lambda name: decodes[name].value("diptych_worker_sequences")))
        two_and_two.processes()[killed[0]].kill()

    async with two_and_two.http() as http:
        undisturbed = await ask(http, body(N, max_tokens=200))
        killing = asyncio.create_task(kill())
        answer = await streamed(http, body(N, max_tokens=200), reached)
        await killing
    assert token_ids(answer) == token_ids(undisturbed)
    assert token_scores(answer) == token_scores(undisturbed)
    assert answer["timings"]["attempts"] == 1 + N
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert answer["usage"][field] == undisturbed["usage"][field]
    await two_and_two.until_said(f"{killed[0]} is ready again", after=said)
