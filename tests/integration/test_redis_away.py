"""What requests find in caches while Redis is away, when it is back, and from a gateway that just started.

Production workers and gateways over a real Valkey that is killed and started again, empty, on the same port.
The policy is `prefix_aware`, so that nothing but the knowledge of caches decides where prompts go.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from services.core.clock import SystemClock
from services.gateway.door.tenant import ANYBODY
from services.gateway.served_model import ServedModel
from services.index.memory_index import MemoryPrefixIndex
from services.index.redis_index import RedisPrefixIndex
from services.membership.memory_membership import MemoryMembership
from services.membership.redis_membership import RedisMembership
from services.store.embedded import EmbeddedValkey
from tests.support.completions import MODEL
from tests.support.whole_cluster import Stores, WholeCluster, whole_cluster

GROUPS, PREFIX_TOKENS, TAIL_TOKENS = 6, 40, 9
PUBLISHED_AGAIN_S = 12.0  # a worker looks every 5 s whether its entries are there
POLICY = {"policy": "prefix_aware", "prefix_fetch": False}


def prompt(group: int, tail: int) -> list[int]:
    """Prompts of a group have the prefix in common, ten full blocks."""
    tokens = [group * 1_000 + n for n in range(PREFIX_TOKENS)]
    return [*tokens, *(40_000 + group * 100 + tail * 10 + n for n in range(TAIL_TOKENS))]


async def cached(http: httpx.AsyncClient, group: int, tail: int) -> int:
    """The prompt's tokens that nobody had to compute."""
    body: dict[str, Any] = {"model": MODEL, "prompt": prompt(group, tail), "max_tokens": 3}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


async def hits(http: httpx.AsyncClient, tail: int) -> list[int]:
    """Of one prompt of each group."""
    return [await cached(http, group, tail) for group in range(GROUPS)]


async def located(cluster: WholeCluster) -> list[dict[str, int]]:
    """What the newest gateway knows of each group's first prompt."""
    view, salt = cluster.gateways[-1].view, ANYBODY.salt("", "key")
    return [(await view.locate(prompt(group, 0), salt)).cached for group in range(GROUPS)]


ALL_HIT = [PREFIX_TOKENS] * GROUPS


@pytest.fixture
def valkey() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture
async def cluster(valkey: EmbeddedValkey) -> AsyncIterator[WholeCluster]:
    stores = Stores(partial(RedisPrefixIndex, valkey.url), partial(RedisMembership, valkey.url))
    async with whole_cluster(stores) as cluster:
        yield cluster


async def until_located(cluster: WholeCluster, wanted: Callable[[list[dict[str, int]]], bool]) -> None:
    async with asyncio.timeout(PUBLISHED_AGAIN_S):
        while not wanted(await located(cluster)):
            await asyncio.sleep(0.02)


async def test_a_gateway_that_has_just_started_finds_every_prefix_at_once(
    cluster: WholeCluster, model: ServedModel
) -> None:
    async with cluster.gateway(model, **POLICY) as http:
        assert await hits(http, tail=0) == [0] * GROUPS
        await asyncio.sleep(0.2)  # published
        known = await located(cluster)
        assert await hits(http, tail=1) == ALL_HIT
    async with cluster.gateway(model, **POLICY) as http:
        assert await located(cluster) == known
        assert await hits(http, tail=2) == ALL_HIT


async def test_a_killed_and_restarted_redis_costs_no_hit_and_gets_all_entries_again(
    cluster: WholeCluster, model: ServedModel, valkey: EmbeddedValkey
) -> None:
    async with cluster.gateway(model, **POLICY) as http:
        assert await hits(http, tail=0) == [0] * GROUPS
        await asyncio.sleep(1.2)  # the index alone tells what is where
        known = await located(cluster)
        os.kill(valkey.pid, signal.SIGKILL)
        assert await hits(http, tail=1) == ALL_HIT, "the last snapshot serves"
        assert await cached(http, GROUPS, tail=0) == 0
        assert await cached(http, GROUPS, tail=1) == PREFIX_TOKENS, "also of what was asked meanwhile"
        valkey.start(port=valkey.port)
        assert await hits(http, tail=2) == ALL_HIT, "until workers have published again, too"
    async with cluster.gateway(model, **POLICY) as http:  # which has no memory of its own
        await until_located(cluster, lambda found: found == known)
        assert await hits(http, tail=3) == ALL_HIT
        assert await cached(http, GROUPS, tail=2) == PREFIX_TOKENS


async def test_the_twins_behave_alike(model: ServedModel) -> None:
    clock = SystemClock()
    index, membership = MemoryPrefixIndex(clock), MemoryMembership(clock)
    async with whole_cluster(Stores(lambda: index, lambda: membership)) as cluster:
        async with cluster.gateway(model, **POLICY) as http:
            assert await hits(http, tail=0) == [0] * GROUPS
            await asyncio.sleep(1.2)
            known = await located(cluster)
            index.available = membership.available = False
            assert await hits(http, tail=1) == ALL_HIT
            index.lose_everything()
            membership.lose_everything()
            index.available = membership.available = True
            assert await hits(http, tail=2) == ALL_HIT
        async with cluster.gateway(model, **POLICY) as http:
            await until_located(cluster, lambda found: found == known)
            assert await hits(http, tail=3) == ALL_HIT
