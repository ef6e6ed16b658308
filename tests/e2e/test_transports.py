"""The way that KV travels changes no token, and a worker that dies under its readers changes none either. All
of it between parts that know each other by their certificates."""

import asyncio
from pathlib import Path

import httpx
import pytest

from services.core.errors import PeerRefused, WorkerLost
from services.launch.authority import create_authority
from services.launch.lock import lock_from_state
from services.wire.channel import TCP
from services.wire.cluster_lock import lock_network
from services.wire.control import set_role
from tests.e2e.conftest import Clusters
from tests.e2e.test_failures import KILL_AFTER, LONG_PROMPT, PROMPT, SAMPLED, TOKENS, busy_worker, streamed
from tests.support.certificates import node
from tests.support.cluster import ClusterSpec
from tests.support.completions import complete, greedy

OVER_GRPC = ClusterSpec(prefill=1, decode=1, split="always", blocks=400, transports="grpc", locked=True)
# Without gRPC to fall back to, a transfer that cannot use NIXL fails.
OVER_NIXL = ClusterSpec(prefill=2, decode=2, split="always", blocks=400, transports="nixl", locked=True)
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


async def test_a_locked_cluster_serves_no_stranger_and_goes_on(clusters: Clusters, tmp_path: Path) -> None:
    cluster = clusters.get(OVER_NIXL)
    assert cluster.url.startswith("https://")
    worker = (await cluster.reports())[0]
    strangers = [TCP, lock_network(node(create_authority(tmp_path / "ca"), "stranger"))]
    for stranger in strangers:
        with pytest.raises((PeerRefused, WorkerLost)):
            await set_role(stranger, worker.address, worker.worker_id, worker.role, timeout_s=5.0)
    ours = lock_network(lock_from_state(cluster.state.lock))
    assert await set_role(ours, worker.address, worker.worker_id, worker.role, timeout_s=5.0) == worker.role
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as stranger_to_its_authority:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await stranger_to_its_authority.get("/health")
    async with cluster.http() as http:
        assert (await complete(http, greedy(PROMPT, 4))).timings["prefill_worker"]
    logs = (cluster.home / f"logs/{worker.worker_id}.log").read_text()
    assert "Handshake failed" in logs
