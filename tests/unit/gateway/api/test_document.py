"""The OpenAPI document is true: schemathesis sends what it allows and forbids, and reads the answers."""

from datetime import UTC, datetime

from services.core.clock import SystemClock
from services.gateway.door.door import Locks
from services.keys import changes
from services.keys.memory_keys import MemoryKeys
from services.keys.memory_limits import MemoryLimits
from tests.support.schemathesis_run import narrowed, schemathesis
from tests.unit.gateway.in_memory_cluster import MODEL

# Its bodies are those of two other paths, where every field is tried: half of the time.
SETTINGS = """
[[operations]]
include-path = "/v1/route"
phases.coverage.enabled = false
"""


async def test_every_request_gets_an_answer_that_the_document_has_and_none_a_5xx(
    start_cluster, tmp_path
) -> None:
    """Over a gateway with API keys, so that requests without one are among them."""
    store = MemoryKeys()
    _, key = await changes.create(store, "schemathesis", datetime.now(UTC))
    cluster = await start_cluster(locks=Locks(store, MemoryLimits(SystemClock())))
    document = (await cluster.http.get("/openapi.json")).json()
    operations = sum(len(path) for path in document["paths"].values())
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    said = await schemathesis(
        tmp_path,
        cluster.url,
        narrowed(document, {"model": {"type": "string", "enum": [MODEL]}}),
        f"--header=Authorization: Bearer {key}",
        "--phases=coverage,fuzzing",
        "--max-examples=10",
        "--continue-on-failure",
    )
    assert f"Tested: {operations}\n" in said
    assert cluster.workers.calls, "no request was computed"
