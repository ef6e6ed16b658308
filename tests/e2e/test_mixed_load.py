"""Hundreds of requests of all kinds on a cluster with too little memory, a fifth of them hung up on.

The load client checks each answer; here the cluster is checked: nobody was failed, memory really was
short, and (in the fixture that follows every test) everything came back.
"""

import asyncio

import pytest

from loadtest import mixed
from tests.e2e.conftest import Clusters
from tests.support.cluster import ClusterSpec, RunningCluster
from tests.support.completions import complete, greedy

# 16 clients of 3 to 25 blocks each want more than there are.
SHORT_OF_MEMORY = ClusterSpec(prefill=1, decode=1, split="always", blocks=48)
REQUESTS = 250
CANCEL_SHARE = 0.2


@pytest.fixture
def cluster(clusters: Clusters) -> RunningCluster:
    return clusters.get_only(SHORT_OF_MEMORY)


async def test_no_request_fails_and_nothing_is_lost_when_memory_is_short(cluster: RunningCluster) -> None:
    summary = await mixed.run(cluster.url, REQUESTS, CANCEL_SHARE, concurrency=16, seed=1)
    await cluster.await_quiet()
    gateway, workers = await cluster.gateway_metrics(), await cluster.worker_metrics()
    decode, prefill = workers["decode-0"], workers["prefill-0"]
    computed = prefill.value("diptych_worker_batch_tokens_sum", kind="prefill")
    print(f"{computed:g} prompt tokens computed")
    print(summary)
    assert summary.problems == {}
    assert summary.completed + summary.cancelled == REQUESTS
    assert summary.cancelled > REQUESTS * CANCEL_SHARE / 2
    assert computed > 16 * SHORT_OF_MEMORY.blocks, "nothing had to be evicted"
    for worker in (decode, prefill):
        held = [worker.value("diptych_worker_blocks", state=state) for state in ("free", "cached")]
        assert sum(held) == SHORT_OF_MEMORY.blocks
    ended = gateway.value("diptych_gateway_requests_total")
    assert ended == gateway.value("diptych_gateway_requests_total", outcome="ok") + gateway.value(
        "diptych_gateway_requests_total", outcome="cancelled"
    )


async def test_preempted_answers_go_on_as_if_nothing_had_happened(cluster: RunningCluster) -> None:
    """Ten answers that need two blocks each at first and fourteen in the end, where 72 are."""
    bodies = [greedy(f"Letter number {n} to my sister, written on a train:", 200) for n in range(10)]
    async with cluster.http() as http:
        together = await asyncio.gather(*(complete(http, body) for body in bodies))
        preempted = (await cluster.worker_metrics())["decode-0"].value("diptych_worker_preemptions_total")
        assert preempted > 0
        for body, answer in list(zip(bodies, together, strict=True))[-3:]:  # the newest are preempted first
            assert (await complete(http, body)).token_ids == answer.token_ids
