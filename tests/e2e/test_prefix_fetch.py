"""A prefix that one prefill worker has computed is fetched by the other, which computes only the rest."""

import asyncio

import httpx
import pytest

from services.core.block_hash import chain_hashes, chain_root
from services.index.redis_index import RedisPrefixIndex
from services.model.files import open_model
from tests.e2e.test_live_changes import change_role
from tests.support.cluster import RunningCluster
from tests.support.completions import Answer, complete, greedy
from tests.support.kernels import scores
from tests.support.prompts import build_prompts
from tests.support.scrape import Scrape

NEW_TOKENS = 24
PREFIX, TAIL = 1024, 129  # lengths; the prefix is 64 whole blocks


@pytest.fixture(scope="module")
def prompts(default_model) -> dict[int, list[int]]:
    return {len(prompt): prompt for prompt in build_prompts(open_model(default_model).tokenizer())}


async def test_a_long_shared_prompt_is_fetched_from_a_worker_that_computes_prompts_no_more(
    two_and_two: RunningCluster, prompts
) -> None:
    """The worker that has the prefix is made a decode worker: the other one must serve the next prompt."""
    cluster = two_and_two
    prompt = prompts[PREFIX] + prompts[TAIL]
    async with cluster.http() as http:
        warm = (await complete(http, greedy(prompts[PREFIX], 1))).timings["prefill_worker"]
        cold = {"prefill-0": "prefill-1", "prefill-1": "prefill-0"}[warm]
        await until_published(cluster, warm, prompts[PREFIX])
        before = (await cluster.worker_metrics())[cold]
        await change_role(cluster, warm, "decode")
        await until_gateway_knows(http, warm, "decode")  # else it tries the worker first, and avoids it then
        answer = await complete(http, greedy(prompt, NEW_TOKENS) | scores())
        await change_role(cluster, warm, "prefill")
        after = (await cluster.worker_metrics())[cold]
        computed = await complete(http, greedy(prompt, NEW_TOKENS) | scores() | {"cache_salt": "computed"})
    assert answer.timings["prefill_worker"] == cold
    check_counts(answer, before, after)
    assert computed.timings["fetched_tokens"] == computed.timings["cached_tokens_prefill"] == 0
    assert (answer.token_ids, answer.logprobs) == (computed.token_ids, computed.logprobs)


def check_counts(answer: Answer, before: Scrape, after: Scrape) -> None:
    """The worker computed only what follows the prefix, and says so."""

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert (answer.timings["cached_tokens_prefill"], answer.timings["fetched_tokens"]) == (0, PREFIX)
    assert grown("diptych_worker_batch_tokens_sum", kind="prefill") == TAIL
    assert grown("diptych_fetch_tokens_total") == PREFIX
    assert grown("diptych_fetch_failures_total") == 0
    assert answer.usage["prompt_tokens"] == PREFIX + TAIL
    assert answer.usage["prompt_tokens_details"] == {"cached_tokens": PREFIX}


async def until_gateway_knows(http: httpx.AsyncClient, worker_id: str, role: str) -> None:
    async with asyncio.timeout(10):
        while {w["worker_id"]: w["role"] for w in (await http.get("/v1/cluster")).json()}[worker_id] != role:
            await asyncio.sleep(0.02)


async def until_published(cluster: RunningCluster, worker_id: str, prompt: list[int]) -> None:
    """Wait until the index knows that the worker has the prompt's blocks."""
    (report,) = [report for report in await cluster.reports() if report.worker_id == worker_id]
    size = report.compatibility.block_size
    hashes = chain_hashes(prompt, size, chain_root(report.compatibility))
    index = RedisPrefixIndex(cluster.state.redis_url)
    async with asyncio.timeout(10):
        while (await index.locate(hashes, [report.key])).get(report.key, 0) < len(prompt) // size:
            await asyncio.sleep(0.02)
    await index.close()
