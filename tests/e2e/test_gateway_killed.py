"""A gateway is killed: its clients lose their connections, and nothing else is lost.

Two gateways share the workers and one Valkey, or a Redis Cluster. A retry at the other one finds the
prompt in the prefix cache, because what the workers hold is known to every gateway.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest

from services.core.parent_death import dying_with_parent
from services.launch.cluster import claim_port
from tests.e2e.conftest import SPLIT, Clusters
from tests.e2e.test_failures import streamed
from tests.support.cluster import REQUEST_TIMEOUT_S, ROOT, RunningCluster, until
from tests.support.completions import complete, greedy

PROMPT = [n * 31 % 40_000 + 200 for n in range(300)]
BLOCK_TOKENS = 16
TOKENS = 120
QUIET_S = 5.0  # the workers must not wait for leases or timeouts before they let go


class Gateway:
    """A second gateway of a running cluster, as a process of its own."""

    def __init__(self, cluster: RunningCluster) -> None:
        port = claim_port("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "services.launch.cli", "gateway", "--port", str(port)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DIPTYCH_GATEWAY__REDIS": cluster.state.redis_url,
            "DIPTYCH_GATEWAY__ROUTE_SPLIT": "always",
            **{f"DIPTYCH_CLUSTER__{name.upper()}": value for name, value in cluster.state.lock.items()},
        }
        self.process = subprocess.Popen(
            dying_with_parent(command, 9), env=environment, stderr=subprocess.DEVNULL
        )

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=REQUEST_TIMEOUT_S)

    @property
    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/ready", trust_env=False).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False


@contextmanager
def another_gateway(cluster: RunningCluster) -> Iterator[Gateway]:
    other = Gateway(cluster)
    try:
        yield other
    finally:
        other.process.kill()
        other.process.wait()


async def test_a_retry_at_another_gateway_finds_the_prefix_cache(split: RunningCluster) -> None:
    with another_gateway(split) as other:
        await check_retry(split, other)


async def test_it_finds_the_prefix_cache_in_a_redis_cluster_too(
    clusters: Clusters, redis_url: Callable[[str], str]
) -> None:
    cluster = clusters.get_only(replace(SPLIT, redis=redis_url("redis cluster")))
    with another_gateway(cluster) as other:
        await check_retry(cluster, other)


async def check_retry(cluster: RunningCluster, other: Gateway) -> None:
    await until(lambda: other.is_ready, 60, lambda: "the second gateway did not get ready")
    body = greedy(PROMPT, TOKENS)
    async with other.http() as http:
        with pytest.raises(httpx.TransportError):
            await streamed(http, body, 5, lambda _: other.process.kill())
    await cluster.await_quiet(QUIET_S)
    async with cluster.http() as http:
        answer = await complete(http, body)
        fresh = await complete(http, body | {"cache_salt": "undisturbed"})
    whole_blocks = len(PROMPT) // BLOCK_TOKENS * BLOCK_TOKENS
    assert answer.usage["prompt_tokens_details"]["cached_tokens"] >= whole_blocks - BLOCK_TOKENS
    assert fresh.usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert answer.token_ids == fresh.token_ids
