"""However a client goes, whether its answer is streamed or not, the cluster is quiet soon."""

import asyncio

import pytest

from tests.support.cluster import RunningCluster
from tests.support.completions import first_chunks, greedy

PROMPT = "Once upon a time, in a small village by the sea, there lived"
TOKENS = 2000  # would take most of a minute
QUIET_S = 3  # for a request that ran on it would be too short, for a lease that nobody released too


async def test_a_client_that_goes_in_the_middle_of_a_stream_leaves_nothing_behind(
    split: RunningCluster,
) -> None:
    async with split.http() as http:
        assert len(await first_chunks(http, greedy(PROMPT, TOKENS), 5)) == 5
    await split.await_quiet(QUIET_S)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_before_the_first_byte_leaves_nothing_behind(
    split: RunningCluster, stream: bool
) -> None:
    prompt = [n * 31 % 40_000 + 200 for n in range(1500)]  # takes seconds to compute
    body = greedy(prompt, TOKENS) | {"stream": stream, "cache_salt": f"unfinished {stream}"}
    async with split.http() as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=body))
        await split.until_computing("prefill-0", "prefill")
        asking.cancel()
        await asyncio.wait([asking])
    await split.await_quiet(QUIET_S)


async def test_a_client_that_goes_while_an_unstreamed_answer_is_decoded_leaves_nothing_behind(
    split: RunningCluster,
) -> None:
    async with split.http() as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=greedy(PROMPT, TOKENS)))
        await split.until_computing("decode-0", "decode")
        asking.cancel()
        await asyncio.wait([asking])
    await split.await_quiet(QUIET_S)


async def test_a_cluster_at_work_is_not_taken_for_quiet(split: RunningCluster) -> None:
    async with split.http() as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=greedy(PROMPT, TOKENS)))
        await split.until_computing("decode-0", "decode")
        with pytest.raises(AssertionError, match="decode-0 has 1 running sequences; decode-0 has"):
            await split.await_quiet(timeout_s=0.5)
        asking.cancel()
        await asyncio.wait([asking])


async def test_requests_of_clients_that_went_are_counted_as_cancelled(split: RunningCluster) -> None:
    labels = {"endpoint": "completions", "outcome": "cancelled"}
    before = (await split.gateway_metrics()).value("diptych_gateway_requests_total", **labels)
    async with split.http() as http:
        await first_chunks(http, greedy(PROMPT, 500), 1)
    await split.await_quiet(QUIET_S)
    after = (await split.gateway_metrics()).value("diptych_gateway_requests_total", **labels)
    assert after == before + 1
