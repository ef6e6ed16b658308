"""A prefix that one prefill worker has computed is fetched by the other when the first is busy."""

import asyncio

import pytest

from services.core.block_hash import chain_hashes, chain_root
from services.index.redis_index import RedisPrefixIndex
from services.model.files import open_model
from tests.e2e.conftest import Clusters
from tests.support.cluster import ClusterSpec, RunningCluster
from tests.support.completions import Answer, complete, greedy
from tests.support.prompts import build_prompts
from tests.support.reference import Reference
from tests.support.scrape import Scrape

TWO_PREFILLS = ClusterSpec(prefill=2, decode=1, split="always", blocks=1200)
NEW_TOKENS = 24
PREFIX, FIRST_TAIL, SECOND_TAIL = 1024, 404, 129  # lengths; the prefix is 64 whole blocks


@pytest.fixture(scope="module")
def prompts(default_model) -> dict[int, list[int]]:
    return {len(prompt): prompt for prompt in build_prompts(open_model(default_model).tokenizer())}


async def test_a_long_shared_prompt_is_fetched_where_the_worker_that_has_it_is_busy(
    clusters: Clusters, prompts, default_model
) -> None:
    cluster = clusters.get_only(TWO_PREFILLS)
    first, second = (prompts[PREFIX] + prompts[tail] for tail in (FIRST_TAIL, SECOND_TAIL))
    async with cluster.http() as http:
        warm = (await complete(http, greedy(prompts[PREFIX], 1))).timings["prefill_worker"]
        await until_published(cluster, warm, prompts[PREFIX])
        before = await cluster.worker_metrics()
        busy = asyncio.create_task(complete(http, greedy(first, NEW_TOKENS)))
        await cluster.until_computing(warm, "prefill")
        answer = await complete(http, greedy(second, NEW_TOKENS))
        others = await busy
    cold = answer.timings["prefill_worker"]
    assert (others.timings["prefill_worker"], {warm, cold}) == (warm, {"prefill-0", "prefill-1"})
    check_counts(answer, before[cold], (await cluster.worker_metrics())[cold])
    reference = Reference(default_model)
    reference.check_greedy(first, others.token_ids)
    reference.check_greedy(second, answer.token_ids)


def check_counts(answer: Answer, before: Scrape, after: Scrape) -> None:
    """The worker computed only what follows the prefix, and says so."""

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert (answer.timings["cached_tokens_prefill"], answer.timings["fetched_tokens"]) == (0, PREFIX)
    assert grown("diptych_worker_batch_tokens_sum", kind="prefill") == SECOND_TAIL
    assert grown("diptych_fetch_tokens_total") == PREFIX
    assert grown("diptych_fetch_failures_total") == 0
    assert answer.usage["prompt_tokens"] == PREFIX + SECOND_TAIL
    assert answer.usage["prompt_tokens_details"] == {"cached_tokens": PREFIX}


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
