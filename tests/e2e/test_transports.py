"""The way that KV travels changes no token, and a worker that dies under its readers changes none either."""

import asyncio

import pytest

from tests.e2e.conftest import Clusters
from tests.e2e.test_failures import KILL_AFTER, LONG_PROMPT, PROMPT, SAMPLED, TOKENS, busy_worker, streamed
from tests.support.cluster import ClusterSpec
from tests.support.completions import complete, greedy

OVER_GRPC = ClusterSpec(prefill=1, decode=1, split="always", blocks=400, transports="grpc")
# Without gRPC to fall back to, a transfer that cannot use NIXL fails.
OVER_NIXL = ClusterSpec(prefill=2, decode=2, split="always", blocks=400, transports="nixl")
BODIES = [
    greedy(PROMPT, TOKENS),
    greedy(PROMPT, TOKENS) | SAMPLED,
    greedy(LONG_PROMPT, 16),
]

pytest.importorskip("nixl")


async def test_over_nixl_all_tokens_are_those_of_grpc_also_when_a_worker_is_killed(
    clusters: Clusters,
) -> None:
    cluster = clusters.get_only(OVER_GRPC)
    async with cluster.http() as http:
        expected = [await complete(http, body) for body in BODIES]
    cluster = clusters.get_only(OVER_NIXL)
    async with cluster.http() as http:
        answers = [await complete(http, body) for body in BODIES]
        assert [a.token_ids for a in answers] == [e.token_ids for e in expected]
        assert all(answer.timings["prefill_worker"] for answer in answers)

        # A decode worker dies while it streams, a prefill worker while its blocks are read.
        reached = asyncio.Event()
        streaming = asyncio.create_task(streamed(http, BODIES[1], KILL_AFTER, lambda _: reached.set()))
        await reached.wait()
        cluster.processes()[await busy_worker(cluster, "decode")].kill()
        answer = await streaming
        assert answer.token_ids == expected[1].token_ids
        assert answer.timings["attempts"] == 2
        await cluster.await_quiet(timeout_s=60)
        answering = asyncio.create_task(complete(http, BODIES[2] | {"cache_salt": "anew"}))
        cluster.processes()[await busy_worker(cluster, "prefill")].kill()
        assert (await answering).token_ids == expected[2].token_ids
    await cluster.await_quiet(timeout_s=60)
