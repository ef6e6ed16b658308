"""What one tenant has computed saves no other one anything, on workers with real caches."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.gateway.served_model import ServedModel
from tests.support.completions import MODEL
from tests.support.in_process_cluster import InProcessCluster, in_process_cluster

PROMPT = [n * 7919 % 40_000 + 100 for n in range(60)]
KEY, OTHER = "Bearer key-one", "Bearer key-two"
# Full blocks of four tokens; the prompt's last token is computed in any case.
CACHED = len(PROMPT) - 4


@pytest.fixture(params=["always", "never"])
async def cluster(model: ServedModel, request: pytest.FixtureRequest) -> AsyncIterator[InProcessCluster]:
    async with in_process_cluster(model, prefill=1, decode=1, route_split=request.param) as cluster:
        yield cluster


async def ask(cluster: InProcessCluster, header: str | None, **body: Any) -> dict[str, Any]:
    """The timings of an answer: which worker had how many of the prompt's tokens."""
    asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "timings": True, **body}
    headers = {"Authorization": header} if header else {}
    response = await cluster.http.post("/v1/completions", json=asked, headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    answer["timings"]["cached_tokens"] = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return answer["timings"]


def computed(cluster: InProcessCluster) -> float:
    """Prompt tokens that all workers together have computed."""
    name, labels = "diptych_worker_batch_tokens_sum", {"kind": "prefill"}
    registries = [worker.metrics.registry for worker in cluster.workers.values()]
    return sum(registry.get_sample_value(name, labels) or 0.0 for registry in registries)


COUNTS = ("cached_tokens", "cached_tokens_prefill", "cached_tokens_decode", "fetched_tokens")


async def test_a_prompt_of_another_key_or_salt_is_computed_as_if_nobody_had_sent_it(
    cluster: InProcessCluster,
) -> None:
    await ask(cluster, KEY)
    whole = computed(cluster)
    assert whole >= len(PROMPT)
    assert (await ask(cluster, KEY))["cached_tokens"] == CACHED
    for header, body in ((OTHER, {}), (None, {}), (KEY, {"cache_salt": "mine"})):
        before = computed(cluster)
        first = await ask(cluster, header, **body)
        assert [first[count] for count in COUNTS] == [0, 0, 0, 0]
        assert computed(cluster) - before == whole
        assert (await ask(cluster, header, **body))["cached_tokens"] == CACHED
