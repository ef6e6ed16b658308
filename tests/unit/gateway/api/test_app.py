"""The HTTP API from outside, through a real server and OpenAI's own client."""

import asyncio
import json

import openai
import pytest

from services.core.errors import EngineFailed, ModelFileError, Overloaded
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL, until
from tests.unit.gateway.scripted_worker_server import report

HELLO = [{"role": "user", "content": "What is the capital of France?"}]


def async_client(cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)


async def test_openai_client_gets_a_whole_chat_answer(cluster) -> None:
    async with async_client(cluster) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(cluster.answer_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_openai_client_gets_a_streamed_chat_answer_with_usage(cluster) -> None:
    async with async_client(cluster) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0] for chunk in chunks[:-1]]
    assert deltas[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in deltas) == ANSWER
    assert [choice.finish_reason for choice in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(cluster.answer_ids)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_synchronous_openai_client_works_too(cluster) -> None:
    def talk() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.completions.create(model=MODEL, prompt="France", max_tokens=100)
            stream = client.completions.create(model=MODEL, prompt="France", max_tokens=100, stream=True)
            return whole.choices[0].text, "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(talk) == (ANSWER, ANSWER)


async def test_completions_default_to_sixteen_tokens_and_say_length(cluster) -> None:
    async with async_client(cluster) as client:
        answer = await client.completions.create(model=MODEL, prompt=[1, 2, 3])
    assert answer.usage.completion_tokens == 16
    assert answer.usage.prompt_tokens == 3
    assert answer.choices[0].finish_reason == "length"
    assert ANSWER.startswith(answer.choices[0].text.rstrip("\ufffd"))


async def test_models_are_listed_and_found_by_name(cluster) -> None:
    async with async_client(cluster) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")


async def test_one_token_answers_need_no_decode_worker(cluster) -> None:
    async with async_client(cluster) as client:
        answer = await client.completions.create(model=MODEL, prompt="France", max_tokens=1)
    assert answer.usage.completion_tokens == 1
    assert [call.kind for call in cluster.workers.calls] == ["prefill"]
    assert cluster.metric("routes_total", kind="prefill_only") == 1


async def test_without_prefill_workers_the_decode_worker_does_all(start_cluster) -> None:
    cluster = await start_cluster(reports=[report("d1", "decode")])
    async with async_client(cluster) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == ANSWER
    assert cluster.metric("routes_total", kind="decode_alone") == 1


async def test_timings_tell_the_seed_that_drew_the_answer(cluster) -> None:
    body = {"model": MODEL, "prompt": "a", "timings": True}
    given = (await cluster.http.post("/v1/completions", json=body | {"seed": 7})).json()["timings"]
    drawn = (await cluster.http.post("/v1/completions", json=body)).json()["timings"]
    assert given["seed"] == cluster.workers.calls[0].sequence.sampling.seed == 7
    assert drawn["seed"] == cluster.workers.calls[-1].sequence.sampling.seed


async def test_requested_timings_come_with_the_answer_and_on_the_last_chunk(cluster) -> None:
    body = {"model": MODEL, "messages": HELLO, "timings": True}
    whole = (await cluster.http.post("/v1/chat/completions", json=body)).json()
    assert whole["timings"]["attempts"] == 1
    assert whole["timings"]["prefill_worker"][0] == "p"
    assert whole["timings"]["decode_worker"][0] == "d"
    assert whole["timings"]["first_token"] <= whole["timings"]["total"]
    for options in ({}, {"stream_options": {"include_usage": True}}):
        text = (await cluster.http.post("/v1/chat/completions", json=body | {"stream": True} | options)).text
        *chunks, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert done == "[DONE]"
        assert ["timings" in json.loads(chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_without_the_wish_there_are_no_timings_and_no_usage_in_chunks(cluster) -> None:
    body = {"model": MODEL, "messages": HELLO, "stream": True}
    text = (await cluster.http.post("/v1/chat/completions", json=body)).text
    assert "timings" not in text
    assert "usage" not in text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_before_it_and_cancels_the_decode(
    cluster, tokenizer, stream
) -> None:
    async with async_client(cluster) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=HELLO, stop=["capital of", "never"], stream=stream, timeout=30
        )
        text = answer.choices[0].message.content if not stream else ""
        if stream:
            chunks = [chunk.choices[0] async for chunk in answer]
            text = "".join(choice.delta.content or "" for choice in chunks)
            assert chunks[-1].finish_reason == "stop"
        else:
            tokens = len(
                cluster.gateway.model.tokenizer.encode("Paris is the capital of", add_special_tokens=False)
            )
            assert answer.usage.completion_tokens == tokens
    assert text == "Paris is the "
    assert [call.kind for call in cluster.workers.cancelled] == ["decode"]


async def test_the_request_id_of_the_client_comes_back(cluster) -> None:
    answered = await cluster.http.get("/v1/models", headers={"X-Request-Id": "mine-1"})
    assert answered.headers["X-Request-Id"] == "mine-1"
    made = [(await cluster.http.get("/v1/models")).headers["X-Request-Id"] for _ in range(2)]
    assert made[0] != made[1]


async def test_an_unprintable_request_id_is_replaced(cluster) -> None:
    answered = await cluster.http.get("/v1/models", headers={"X-Request-Id": "x" * 500})
    assert len(answered.headers["X-Request-Id"]) == 32


async def test_equal_client_ids_do_not_meet_on_a_worker(cluster) -> None:
    headers = {"X-Request-Id": "same"}
    body = {"model": MODEL, "prompt": "a"}
    await asyncio.gather(
        *[cluster.http.post("/v1/completions", json=body, headers=headers) for _ in range(2)]
    )
    assert len({call.sequence.request_id for call in cluster.workers.calls}) == 2


class TestHealth:
    async def test_ready_with_a_decode_worker(self, cluster) -> None:
        for path in ("/health", "/health/live", "/health/ready"):
            assert (await cluster.http.get(path)).status_code == 200

    @pytest.mark.parametrize(
        "reports",
        [[], [report("p1", "prefill")], [report("d1", "decode", state="draining")]],
        ids=["none", "only prefill", "draining"],
    )
    async def test_alive_but_not_ready_without_a_ready_decode_worker(self, start_cluster, reports) -> None:
        cluster = await start_cluster(reports=reports)
        assert (await cluster.http.get("/health/live")).status_code == 200
        assert (await cluster.http.get("/health/ready")).status_code == 503

    async def test_a_draining_gateway_is_not_ready(self, cluster) -> None:
        cluster.gateway.draining = True
        assert (await cluster.http.get("/health/ready")).status_code == 503


class TestErrors:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_an_error_before_the_first_token_has_its_status(self, cluster, stream) -> None:
        cluster.workers.script(ANY_WORKER, "prefill", Fault(ModelFileError("no weights")))
        body = {"model": MODEL, "messages": HELLO, "stream": stream}
        answered = await cluster.http.post("/v1/chat/completions", json=body)
        assert answered.status_code == 500
        assert answered.json()["error"]["code"] == "model_file"
        assert answered.json()["error"]["message"] == "no weights"

    async def test_an_error_in_the_stream_is_an_event_and_no_done_follows(self, cluster) -> None:
        cluster.workers.script(ANY_WORKER, "decode", Fault(ModelFileError("no weights"), after_tokens=2))
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        answered = await cluster.http.post("/v1/chat/completions", json=body)
        assert answered.status_code == 200
        last = answered.text.rstrip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "model_file"
        assert "[DONE]" not in answered.text
        assert cluster.metric("requests_total", endpoint="chat_completions", outcome="model_file") == 1

    async def test_a_bug_in_the_stream_is_an_event_too(self, cluster, caplog) -> None:
        cluster.workers.script(ANY_WORKER, "decode", Fault(ZeroDivisionError("a bug"), after_tokens=2))
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        answered = await cluster.http.post("/v1/chat/completions", json=body)
        last = json.loads(answered.text.rstrip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["type"] == "server_error"
        assert "a bug" not in answered.text
        assert "ZeroDivisionError" in caplog.text

    async def test_a_bug_before_the_stream_is_a_500_without_its_details(self, cluster) -> None:
        cluster.workers.script(ANY_WORKER, "prefill", Fault(ZeroDivisionError("a bug")))
        answered = await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert answered.status_code == 500
        assert answered.json()["error"]["type"] == "server_error"
        assert "a bug" not in answered.text

    async def test_no_worker_is_a_503_with_retry_after(self, start_cluster) -> None:
        cluster = await start_cluster(reports=[], no_worker_timeout_s=0.05)
        answered = await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert answered.status_code == 503
        assert int(answered.headers["Retry-After"]) >= 1
        assert answered.json()["error"]["code"] == "no_worker"

    async def test_workers_that_stay_full_are_a_429_with_retry_after(self, start_cluster) -> None:
        cluster = await start_cluster(admission_timeout_s=0.05)
        cluster.workers.script(ANY_WORKER, "prefill", *[Fault(Overloaded("full"))] * 20)
        answered = await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert answered.status_code == 429
        assert int(answered.headers["Retry-After"]) >= 1

    async def test_more_requests_than_places_get_429_at_once(self, start_cluster) -> None:
        cluster = await start_cluster(inflight_max=1)
        cluster.workers.script(ANY_WORKER, "decode", Fault(None, after_tokens=1))
        body = {"model": MODEL, "prompt": "a"}
        first = asyncio.create_task(cluster.http.post("/v1/completions", json=body))
        await until(lambda: cluster.workers.running)
        refused = await cluster.http.post("/v1/completions", json=body)
        first.cancel()
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "Retry-After" in refused.headers

    async def test_a_request_that_takes_too_long_is_a_504(self, start_cluster) -> None:
        cluster = await start_cluster(request_timeout_s=0.05)
        cluster.workers.script(ANY_WORKER, "prefill", Fault(None))
        answered = await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert answered.status_code == 504
        assert answered.json()["error"]["code"] == "deadline_exceeded"

    async def test_attempts_are_bounded(self, start_cluster) -> None:
        cluster = await start_cluster(attempts_max=2)
        cluster.workers.script(ANY_WORKER, "prefill", *[Fault(EngineFailed("broken"))] * 3)
        answered = await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert answered.status_code == 503
        assert len([call for call in cluster.workers.calls if call.kind == "prefill"]) == 2


class TestMetrics:
    async def test_a_request_leaves_its_counts_and_stages(self, cluster) -> None:
        body = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 5}
        await cluster.http.post("/v1/completions", json=body)
        await cluster.http.post("/v1/completions", json=body | {"max_tokens": -1})
        text = (await cluster.http.get("/metrics")).text
        assert 'requests_total{endpoint="completions",outcome="ok"} 1.0' in text
        assert 'requests_total{endpoint="completions",outcome="bad_request"} 1.0' in text
        assert 'routes_total{kind="split"} 1.0' in text
        assert "diptych_gateway_prompt_tokens_total 3.0" in text
        assert "diptych_gateway_completion_tokens_total 5.0" in text
        assert "diptych_gateway_inter_token_seconds_count 4.0" in text
        for stage in ("received", "admitted", "routed", "prefilling", "decoding"):
            assert f'stage_seconds_count{{stage="{stage}"}} 1.0' in text

    async def test_two_gateways_in_a_process_count_apart(self, start_cluster) -> None:
        first, second = await start_cluster(), await start_cluster()
        await first.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert first.metric("requests_total", endpoint="completions", outcome="ok") == 1
        assert second.metric("requests_total", endpoint="completions", outcome="ok") == 0


async def test_the_openapi_page_names_our_bodies_and_no_foreign_error(cluster) -> None:
    page = (await cluster.http.get("/openapi.json")).json()
    chat = page["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "429"} <= set(chat["responses"])
    assert not {"422", "default"} & set(chat["responses"])
    assert "HTTPValidationError" not in page["components"]["schemas"]
    parameters = page["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "max_completion_tokens", "temperature", "timings", "cache_salt"} <= set(parameters)


async def test_the_answer_is_named_by_the_id_in_its_header(cluster) -> None:
    answered = await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
    assert answered.json()["id"] == f"cmpl-{answered.headers['X-Request-Id']}"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/nothing"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_the_client_s_id_comes_back_with_errors_too(cluster, path, method) -> None:
    answered = await cluster.http.request(method, path, content=b"{", headers={"X-Request-Id": "mine"})
    assert answered.status_code in (400, 404, 405)
    assert answered.headers["X-Request-Id"] == "mine"


async def test_the_client_s_id_comes_back_from_every_route(cluster) -> None:
    documented = (await cluster.http.get("/openapi.json")).json()["paths"]
    paths = [path.format(model_id=MODEL, response_id="resp_1") for path in documented]
    for path in [*paths, "/metrics", "/v1/cluster"]:
        body = {"model": MODEL, "prompt": "a", "input": "a", "messages": HELLO, "tokens": [1]}
        headers = {"X-Request-Id": "mine"}
        for answered in (
            await cluster.http.get(path, headers=headers),
            await cluster.http.post(path, headers=headers, json=body),
            await cluster.http.post(path, headers=headers, json=body | {"stream": True}),
        ):
            assert answered.headers["X-Request-Id"] == "mine", path


async def test_a_bug_s_answer_carries_the_client_s_id(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "prefill", Fault(ZeroDivisionError("a bug")))
    body, headers = {"model": MODEL, "prompt": "a"}, {"X-Request-Id": "mine"}
    answered = await cluster.http.post("/v1/completions", json=body, headers=headers)
    assert (answered.status_code, answered.headers["X-Request-Id"]) == (500, "mine")
