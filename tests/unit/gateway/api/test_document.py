"""The OpenAPI document is true: schemathesis sends what it allows and forbids, and reads the answers."""

import asyncio
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.core.clock import SystemClock
from services.gateway.door.door import Locks
from services.keys import changes
from services.keys.memory_keys import MemoryKeys
from services.keys.memory_limits import MemoryLimits
from tests.unit.gateway.in_memory_cluster import MODEL

SECONDS_MAX = 120
# All but "positive_data_acceptance", because a schema cannot state rules between fields, such as that
# "min_tokens" is at most "max_tokens"; and those about objects that a client creates and removes.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)


def about(model: str, document: dict[str, Any]) -> dict[str, Any]:
    """`document` for requests that name `model`, so that they are not all refused for another's name."""
    for schema in document["components"]["schemas"].values():
        named = schema.get("properties", {}).get("model", {})
        if named.get("type") == "string":
            schema["properties"]["model"] = {"type": "string", "enum": [model]}
    return document


async def schemathesis(folder: Path, url: str, document: dict[str, Any], *arguments: str) -> tuple[int, str]:
    """Its exit code and what it says. It runs in `folder`, the same way every time."""
    (folder / "openapi.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", url, *arguments]
    process = await asyncio.create_subprocess_exec(
        *command,
        "--generation-deterministic",
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(SECONDS_MAX):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_every_request_gets_an_answer_that_the_document_has_and_none_a_5xx(
    start_cluster, tmp_path
) -> None:
    """Over a gateway with API keys, so that requests without one are among them."""
    store = MemoryKeys()
    _, key = await changes.create(store, "schemathesis", datetime.now(UTC))
    cluster = await start_cluster(locks=Locks(store, MemoryLimits(SystemClock())))
    document = (await cluster.http.get("/openapi.json")).json()
    operations = sum(len(path) for path in document["paths"].values())
    code, said = await schemathesis(
        tmp_path,
        cluster.url,
        about(MODEL, document),
        f"--header=Authorization: Bearer {key}",
        f"--checks={','.join(CHECKS)}",
        "--phases=coverage,fuzzing",
        "--max-examples=12",
        "--continue-on-failure",
        "--warnings=off",
    )
    assert code == 0, said
    assert f"Tested: {operations}\n" in said
    assert cluster.workers.calls, "no request was computed"
