"""A client that goes takes its request with it: both workers are cancelled, nothing stays behind."""

import asyncio

import httpx
import pytest

from services.core.errors import ModelFileError
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from tests.unit.gateway.in_memory_cluster import MODEL, until


async def cancelled_kinds(cluster) -> set[str]:
    """What was cancelled, once the gateway has let go of everything."""
    await until(lambda: not cluster.workers.running and cluster.gateway.metrics.inflight._value.get() == 0)
    return {call.kind for call in cluster.workers.cancelled}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_during_prefill_cancels_both_sides(cluster, stream) -> None:
    cluster.workers.script(ANY_WORKER, "prefill", Fault(None))
    cluster.workers.script(ANY_WORKER, "decode", Fault(None))
    body = {"model": MODEL, "prompt": "a", "stream": stream}
    request = asyncio.create_task(cluster.http.post("/v1/completions", json=body))
    await until(lambda: len(cluster.workers.running) == 2)
    request.cancel()
    assert await cancelled_kinds(cluster) == {"prefill", "decode"}
    assert cluster.metric("requests_total", endpoint="completions", outcome="cancelled") == 1


async def test_a_client_that_goes_in_the_stream_cancels_the_decode(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "decode", Fault(None, after_tokens=3))
    body = {"model": MODEL, "prompt": "a", "stream": True, "max_tokens": 100}
    async with cluster.http.stream("POST", "/v1/completions", json=body) as answered:
        lines = answered.aiter_lines()
        await anext(lines)
        await until(lambda: [call.kind for call in cluster.workers.running] == ["decode"])
    assert await cancelled_kinds(cluster) == {"decode"}


async def test_a_client_that_goes_while_the_request_waits_for_room_ends_it(start_cluster) -> None:
    cluster = await start_cluster(reports=[], no_worker_timeout_s=600)
    with pytest.raises(httpx.ReadTimeout):
        await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"}, timeout=0.05)
    assert await cancelled_kinds(cluster) == set()
    assert cluster.metric("requests_total", endpoint="completions", outcome="cancelled") == 1


async def test_a_failing_side_cancels_the_other(cluster) -> None:
    cluster.workers.script(ANY_WORKER, "prefill", Fault(ModelFileError("no")))
    cluster.workers.script(ANY_WORKER, "decode", Fault(None))
    await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
    assert await cancelled_kinds(cluster) == {"decode"}


async def test_an_answer_that_ends_at_its_first_token_does_not_wait_for_the_decode_worker(cluster) -> None:
    cluster.answer_ids[0] = cluster.answer_ids[-1]
    cluster.workers.script(ANY_WORKER, "decode", Fault(None))
    answered = await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
    assert answered.json()["usage"]["completion_tokens"] == 1
    assert answered.json()["choices"][0]["finish_reason"] == "stop"
