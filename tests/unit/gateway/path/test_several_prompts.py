"""Several prompts in one request: each is answered as if it were alone, and they succeed or fail together."""

import asyncio
import json
from collections import defaultdict

import pytest

from services.core.errors import ModelFileError, WorkerLost
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL, until
from tests.unit.gateway.scripted_worker_server import report

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
BODY = {"model": MODEL, "prompt": PROMPTS, "max_tokens": 100, "return_token_ids": True}


@pytest.fixture
async def cluster(cluster, tokenizer):
    """Its model gives each prompt another answer."""
    [end] = tokenizer.end_token_ids
    for number, prompt in enumerate(PROMPTS):
        text = f"This is answer {number}. " * (number + 1)
        cluster.answers[tuple(prompt)] = [*tokenizer.encode(text, add_special_tokens=False), end]
    return cluster


async def ask(cluster, **changes) -> dict:
    answered = await cluster.http.post("/v1/completions", json=BODY | changes)
    assert answered.status_code == 200, answered.text
    return answered.json()


async def chunks(cluster, **changes) -> list[dict]:
    body = BODY | {"stream": True} | changes
    text = (await cluster.http.post("/v1/completions", json=body)).text
    *lines, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    return [json.loads(line) for line in lines]


def by_choice(chunks: list[dict]) -> dict[int, tuple[str, list[int]]]:
    texts, ids = defaultdict(str), defaultdict(list)
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
            ids[choice["index"]] += choice["token_ids"]
    return {index: (texts[index], ids[index]) for index in texts}


@pytest.mark.parametrize("n", [1, 3])
async def test_choices_are_numbered_through_and_answer_each_prompt_as_if_it_were_alone(cluster, n) -> None:
    together = await ask(cluster, n=n)
    alone = [(await ask(cluster, n=n, prompt=prompt))["choices"] for prompt in PROMPTS]
    assert [choice["index"] for choice in together["choices"]] == list(range(n * len(PROMPTS)))
    assert [choice["text"] for choice in together["choices"]] == [c["text"] for one in alone for c in one]
    assert together["choices"][n]["text"].startswith("This is answer 1.")


async def test_a_stream_has_the_same_choices_interleaved(cluster) -> None:
    whole = await ask(cluster, n=2)
    streamed = await chunks(cluster, n=2)
    assert by_choice(streamed) == {c["index"]: (c["text"], c["token_ids"]) for c in whole["choices"]}
    order = [choice["index"] for chunk in streamed for choice in chunk["choices"]]
    assert order != sorted(order), "one prompt was answered after the other"
    finished = [c["index"] for chunk in streamed for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(finished) == list(range(6))


async def test_texts_and_token_ids_may_be_mixed(cluster, tokenizer) -> None:
    mixed = await ask(cluster, prompt=["France?", PROMPTS[1]])
    assert mixed["choices"][0]["text"] == ANSWER
    assert mixed["choices"][1]["text"].startswith("This is answer 1.")
    tokens = len(tokenizer.encode("France?", add_special_tokens=True)) + len(PROMPTS[1])
    assert mixed["usage"]["prompt_tokens"] == tokens


async def test_usage_is_the_sum_and_timings_are_of_each_prompt(cluster) -> None:
    extras = {"timings": True, "explain": True}
    whole = await ask(cluster, n=2, **extras)
    usage = whole["usage"]
    assert usage["prompt_tokens"] == sum(map(len, PROMPTS))
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in whole["choices"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert [timings["attempts"] for timings in whole["timings"]] == [1] * len(PROMPTS)
    assert len(whole["routes"]) == len(PROMPTS)
    last = (await chunks(cluster, stream_options={"include_usage": True}, **extras))[-1]
    assert last["usage"]["prompt_tokens"] == usage["prompt_tokens"]
    assert len(last["timings"]) == len(PROMPTS)
    assert isinstance((await ask(cluster, prompt=[PROMPTS[0]], **extras))["timings"], dict)


async def test_a_given_seed_counts_for_each_prompt_and_of_drawn_ones_each_has_its_own(cluster) -> None:
    async def seeds(**changes) -> list[int]:
        return [timings["seed"] for timings in (await ask(cluster, timings=True, **changes))["timings"]]

    assert await seeds(seed=5) == [5] * len(PROMPTS)
    assert len(set(await seeds())) == len(PROMPTS)


async def test_it_takes_one_slot_and_counts_as_one_request(start_cluster) -> None:
    cluster = await start_cluster(inflight_max=1)
    await ask(cluster)
    assert cluster.metric("requests_total", endpoint="completions", outcome="ok") == 1
    assert cluster.metric("stage_seconds_count", stage="prefilling") == len(PROMPTS)
    assert cluster.metric("time_to_first_token_seconds_count") == len(PROMPTS)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
async def test_a_worker_that_fails_is_retried_for_its_prompt_alone(cluster, kind) -> None:
    whole = await ask(cluster)
    cluster.workers.script(ANY_WORKER, kind, Fault(WorkerLost("gone"), after_tokens=2))
    again = await ask(cluster, timings=True)
    assert [c["token_ids"] for c in again["choices"]] == [c["token_ids"] for c in whole["choices"]]
    assert sorted(timings["attempts"] for timings in again["timings"]) == [1, 1, 2]


class TestFailures:
    async def test_the_failure_of_one_prompt_ends_all(self, cluster) -> None:
        cluster.workers.script(ANY_WORKER, "prefill", Fault(None), Fault(None), Fault(ModelFileError("no")))
        answered = await cluster.http.post("/v1/completions", json=BODY)
        assert answered.status_code == 500
        assert cluster.workers.running == []
        assert cluster.metric("requests_total", endpoint="completions", outcome="model_file") == 1

    async def test_in_a_stream_the_failure_is_the_last_event(self, cluster) -> None:
        hang = Fault(None, after_tokens=2)
        cluster.workers.script(ANY_WORKER, "decode", hang, hang, Fault(ModelFileError("no"), after_tokens=3))
        text = (await cluster.http.post("/v1/completions", json=BODY | {"stream": True})).text
        *_, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert json.loads(last)["error"]["type"] == "server_error"
        assert cluster.workers.running == []

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_client_that_goes_frees_all(self, cluster, stream) -> None:
        cluster.workers.script(ANY_WORKER, "decode", *[Fault(None, after_tokens=1)] * len(PROMPTS))
        request = asyncio.create_task(
            cluster.http.post("/v1/completions", json=BODY | {"stream": stream, "n": 2})
        )
        await until(lambda: sum(call.kind == "decode" for call in cluster.workers.running) == len(PROMPTS))
        request.cancel()
        await until(lambda: not cluster.workers.running)
        await until(lambda: cluster.metric("requests_total", endpoint="completions", outcome="cancelled"))
        assert cluster.metric("inflight") == 0


class TestWaiting:
    """One worker that takes prompts one after the other."""

    @pytest.fixture
    async def busy(self, start_cluster):
        prefill, decode = report("p1", "prefill", address="p1:1"), report("d1", "decode", address="d1:1")
        limits = {"worker_queue_ms_max": 0.001, "ttft_max_s": 0.4, "queue_length_max": 12}
        return await start_cluster(reports=[prefill, decode], **limits)

    async def test_only_the_first_has_to_begin_in_time_and_the_others_wait_while_prompts_are_answered(
        self, busy
    ) -> None:
        slow = [Fault(None) for _ in range(6)]
        busy.workers.script(ANY_WORKER, "prefill", *slow)
        request = asyncio.create_task(ask(busy, prompt=[[n + 1] * 500 for n in range(6)]))
        for number, fault in enumerate(slow):
            await asyncio.sleep(0.15)
            assert sum(call.kind == "prefill" for call in busy.workers.calls) == number + 1
            fault.end.set()
        assert len((await request)["choices"]) == 6

    async def test_nothing_is_computed_before_all_are_let_in(self, busy) -> None:
        answered = await busy.http.post("/v1/completions", json=BODY | {"prompt": [[5] * 500] * 12})
        assert answered.status_code == 429
        assert "Retry-After" in answered.headers
        assert busy.workers.calls == []
        assert len(busy.gateway.queue) == 0
        assert (await ask(busy, prompt=[[5] * 500]))["choices"], "a place was kept"
