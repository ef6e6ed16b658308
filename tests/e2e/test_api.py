"""What clients can rely on, asked with OpenAI's own client and with plain HTTP, of a real cluster."""

import json

import httpx
import openai
import pytest

from services.launch.cli import main
from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL, chunks, complete, greedy

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
STORY = "Once upon a time, in a small village by the sea, there lived"
LONG_STORY = 8 * STORY


def openai_client(cluster: RunningCluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{cluster.url}/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx.AsyncClient(trust_env=False, timeout=120),
    )


class TestOpenAiClient:
    async def test_a_chat_answer_is_right_and_counted(self, split: RunningCluster) -> None:
        async with openai_client(split) as client:
            answer = await client.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0)
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

    async def test_a_stream_is_the_whole_answer_in_pieces(self, split: RunningCluster) -> None:
        async with openai_client(split) as client:
            whole = await client.chat.completions.create(
                model=MODEL, messages=CAPITAL, temperature=0, max_tokens=24
            )
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=CAPITAL,
                temperature=0,
                max_tokens=24,
                stream=True,
                stream_options={"include_usage": True},
            )
            pieces = [chunk async for chunk in stream]
        text = "".join(choice.delta.content or "" for chunk in pieces for choice in chunk.choices)
        assert text == whole.choices[0].message.content
        assert pieces[-1].choices == []
        assert pieces[-1].usage is not None
        assert whole.usage is not None
        assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens

    def test_the_synchronous_client_completes_text(self, split: RunningCluster) -> None:
        plain = httpx.Client(trust_env=False, timeout=120)
        with openai.OpenAI(base_url=f"{split.url}/v1", api_key="none", http_client=plain) as client:
            whole = client.completions.create(model=MODEL, prompt=STORY, max_tokens=12, temperature=0)
            stream = client.completions.create(
                model=MODEL, prompt=STORY, max_tokens=12, temperature=0, stream=True
            )
            assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 12

    async def test_errors_are_the_clients_own_exceptions(self, split: RunningCluster) -> None:
        async with openai_client(split) as client:
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="gpt-4o", messages=CAPITAL)
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(model=MODEL, messages=CAPITAL, n=0)
        assert caught.value.param == "n"


class TestGeneration:
    async def test_an_answer_ends_before_its_stop_string(self, split: RunningCluster) -> None:
        async with split.http() as http:
            free = await complete(http, greedy(STORY, 32))
            stop = free.text[20:26]
            body = greedy(STORY, 32) | {"stop": [stop]}
            response = (await http.post("/v1/completions", json=body)).json()
            streamed = [chunk async for chunk in chunks(http, body)]
        expected = free.text[: free.text.index(stop)]
        assert response["choices"][0]["text"] == expected
        assert response["choices"][0]["finish_reason"] == "stop"
        assert response["usage"]["completion_tokens"] < 32
        assert "".join(choice["text"] for chunk in streamed for choice in chunk["choices"]) == expected

    async def test_ignore_eos_goes_on_where_the_answer_would_end(self, split: RunningCluster) -> None:
        body = {"model": MODEL, "messages": CAPITAL, "temperature": 0, "max_tokens": 40}
        async with split.http() as http:
            ended = (await http.post("/v1/chat/completions", json=body)).json()
            forced = (await http.post("/v1/chat/completions", json=body | {"ignore_eos": True})).json()
        assert ended["choices"][0]["finish_reason"] == "stop"
        assert ended["usage"]["completion_tokens"] < 40
        assert forced["choices"][0]["finish_reason"] == "length"
        assert forced["usage"]["completion_tokens"] == 40

    async def test_a_seed_gives_the_same_text_again_on_any_route(
        self, split: RunningCluster, alone: RunningCluster
    ) -> None:
        body = greedy(STORY, 48) | {"temperature": 0.9, "top_p": 0.95, "seed": 1234}
        async with split.http() as disaggregated, alone.http() as single:
            first = await complete(disaggregated, body)
            again = await complete(disaggregated, body)
            elsewhere = await complete(single, body)
            other = await complete(disaggregated, body | {"seed": 4321})
        assert first.token_ids == again.token_ids == elsewhere.token_ids
        assert first.token_ids != other.token_ids
        assert first.timings["prefill_worker"] is not None
        assert elsewhere.timings["prefill_worker"] is None

    async def test_the_second_turn_finds_the_first_one_in_both_caches(self, split: RunningCluster) -> None:
        first_turn = [{"role": "user", "content": "Tell me about lighthouses. " + STORY * 4}]
        body = {"model": MODEL, "temperature": 0, "max_tokens": 40, "ignore_eos": True, "timings": True}
        async with split.http() as http:
            path = "/v1/chat/completions"
            first = (await http.post(path, json=body | {"messages": first_turn})).json()
            reply = first["choices"][0]["message"]["content"]
            second_turn = [
                *first_turn,
                {"role": "assistant", "content": reply},
                {"role": "user", "content": "Go on."},
            ]
            second = (await http.post(path, json=body | {"messages": second_turn})).json()
        prompt_tokens = first["usage"]["prompt_tokens"]
        whole_blocks = prompt_tokens // 16 * 16
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= whole_blocks - 16
        assert second["timings"]["cached_tokens_prefill"] == cached
        assert second["timings"]["cached_tokens_decode"] >= cached, "D also has the answer it decoded"

    async def test_another_cache_salt_shares_nothing(self, split: RunningCluster) -> None:
        body = greedy("A prompt that is longer than a block of sixteen tokens, for sure. " * 3, 2)
        async with split.http() as http:
            await complete(http, body | {"cache_salt": "tenant 1"})
            same = await complete(http, body | {"cache_salt": "tenant 1"})
            other = await complete(http, body | {"cache_salt": "tenant 2"})
        assert same.usage["prompt_tokens_details"]["cached_tokens"] > 0
        assert other.usage["prompt_tokens_details"]["cached_tokens"] == 0
        assert other.timings["cached_tokens_decode"] == 0

    async def test_the_first_token_comes_from_the_prefill_worker(self, split: RunningCluster) -> None:
        """An answer of one token never meets a decode worker. In longer ones the first token is out
        while the decode worker still waits for KV: the gateway's stage between the two says so."""
        before = await split.gateway_metrics()
        async with split.http() as http:
            one = await complete(http, greedy(STORY, 1) | {"cache_salt": "first token"})
            several = [await complete(http, greedy(STORY * n, 4)) for n in range(1, 5)]
        assert one.timings["prefill_worker"] == "prefill-0"
        assert one.timings["decode_worker"] is None
        assert one.token_ids == several[0].token_ids[:1]
        after = await split.gateway_metrics()
        name = "diptych_gateway_stage_seconds_count"
        waited = [seen.value(name, stage="transferring") for seen in (before, after)]
        assert waited[1] > waited[0]


class TestOperation:
    async def test_the_model_is_listed_and_found(self, split: RunningCluster) -> None:
        async with split.http() as http:
            listed = (await http.get("/v1/models")).json()
            found = await http.get(f"/v1/models/{MODEL}")
            unknown = await http.get("/v1/models/gpt-4o")
        assert [model["id"] for model in listed["data"]] == [MODEL]
        assert found.json()["max_model_len"] == 8192
        assert unknown.status_code == 404

    async def test_gateway_and_workers_are_alive_and_ready(self, split: RunningCluster) -> None:
        async with split.http() as http:
            roots = [split.url, *(r.metrics_url.removesuffix("/metrics") for r in await split.reports())]
            assert len(roots) == 3
            for root in roots:
                for path in ("/health", "/health/live", "/health/ready"):
                    assert (await http.get(root + path)).status_code == 200, root + path

    async def test_metrics_move_with_the_work(self, split: RunningCluster) -> None:
        gateway_before, workers_before = await split.gateway_metrics(), await split.worker_metrics()
        async with split.http() as http:
            answer = await complete(http, greedy(STORY, 10) | {"cache_salt": "metrics"})
        await split.await_quiet()
        gateway, workers = await split.gateway_metrics(), await split.worker_metrics()
        prompt_tokens = answer.usage["prompt_tokens"]

        def moved(name: str, **labels: str) -> float:
            return gateway.value(name, **labels) - gateway_before.value(name, **labels)

        def worker_moved(worker: str, name: str, **labels: str) -> float:
            return workers[worker].value(name, **labels) - workers_before[worker].value(name, **labels)

        assert moved("diptych_gateway_requests_total", endpoint="completions", outcome="ok") == 1
        assert moved("diptych_gateway_prompt_tokens_total") == prompt_tokens
        assert moved("diptych_gateway_completion_tokens_total") == 10
        assert moved("diptych_gateway_time_to_first_token_seconds_count") == 1
        assert moved("diptych_gateway_inter_token_seconds_count") == 9
        assert moved("diptych_gateway_routes_total", kind="split") == 1
        batch = "diptych_worker_batch_tokens_sum"
        assert worker_moved("prefill-0", batch, kind="prefill") == prompt_tokens
        assert worker_moved("decode-0", batch, kind="prefill") == 0, "D never computes what P computed"
        assert worker_moved("decode-0", batch, kind="decode") == 9
        sent = worker_moved("prefill-0", "diptych_transfer_bytes_total", direction="sent")
        assert sent == worker_moved("decode-0", "diptych_transfer_bytes_total", direction="received")
        assert sent > 0
        assert worker_moved("prefill-0", "diptych_worker_leases_ended_total", how="released") == 1
        assert worker_moved("decode-0", "diptych_transfer_seconds_count") == 1


async def test_a_route_is_explained_before_a_request_and_with_its_answer(
    split: RunningCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["explain", LONG_STORY, "--url", f"{split.url}/v1", "--cache-salt", "explained", "--json"]) == 0
    )
    explained = json.loads(capsys.readouterr().out)
    async with split.http() as http:
        body = greedy(LONG_STORY, 4) | {"cache_salt": "explained", "explain": True}
        answer = (await http.post("/v1/completions", json=body)).json()
        again = (await http.post("/v1/route", json=body)).json()
    (route,) = answer["routes"]
    assert route["prefill_worker"] == answer["timings"]["prefill_worker"] == "prefill-0"
    assert explained["route"]["prefill_worker"] == "prefill-0"
    assert [worker["cached_tokens"] for worker in explained["cached"]] == [0, 0]
    blocks = [worker["cached_tokens"] // 16 for worker in again["cached"]]
    assert blocks == [explained["prompt_tokens"] // 16] * 2
