"""Gateways that share an index find as many cached prompts as one that gets all requests.

Over in-memory twins; tests/bench/routing measures the same on virtual time, with every policy.
"""

import asyncio
import random
from contextlib import AsyncExitStack

import httpx
import pytest

from services.core.clock import SystemClock
from services.gateway.served_model import ServedModel
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from tests.support.completions import MODEL
from tests.support.whole_cluster import Stores, whole_cluster

GROUPS, PROMPTS_EACH = 8, 12
PREFIX_TOKENS, TAIL_TOKENS = 40, 9
POLICY = {"policy": "prefix_aware", "prefix_fetch": False}


def prompts(rng: random.Random) -> list[list[int]]:
    """Those of a group have ten blocks in common; groups are mixed."""
    mixed = [
        [
            *range(group * 1_000, group * 1_000 + PREFIX_TOKENS),
            *rng.choices(range(30_000, 45_000), k=TAIL_TOKENS),
        ]
        for group in range(GROUPS)
        for _ in range(PROMPTS_EACH)
    ]
    rng.shuffle(mixed)
    return mixed


async def cached_tokens(http: httpx.AsyncClient, prompt: list[int]) -> int:
    response = await http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 2})
    assert response.status_code == 200, response.text
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


async def hit_tokens(model: ServedModel, gateways: int, at_once: int) -> int:
    """Of all prompts together, on a new cluster; each goes to a gateway drawn at random."""
    clock, rng = SystemClock(), random.Random(3)
    index, membership = MemoryPrefixIndex(clock), MemoryMembership(clock)
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(whole_cluster(Stores(lambda: index, lambda: membership)))
        doors = [await stack.enter_async_context(cluster.gateway(model, **POLICY)) for _ in range(gateways)]
        waiting, hits = prompts(rng), 0
        while waiting:
            burst, waiting = waiting[:at_once], waiting[at_once:]
            hits += sum(await asyncio.gather(*(cached_tokens(rng.choice(doors), prompt) for prompt in burst)))
        return hits


@pytest.mark.parametrize("at_once", [1, 4])
async def test_two_gateways_hit_within_5_percent_of_one(model: ServedModel, at_once: int) -> None:
    one, two = await hit_tokens(model, 1, at_once), await hit_tokens(model, 2, at_once)
    assert one == GROUPS * (PROMPTS_EACH - 1) * PREFIX_TOKENS, "all but the first of each group"
    assert abs(two - one) <= 0.05 * one
