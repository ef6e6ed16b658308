"""schemathesis as a command: sends what an OpenAPI document allows and forbids, and reads the answers."""

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def narrowed(
    document: dict[str, Any], properties: Mapping[str, dict[str, Any]], *, required: bool = False
) -> dict[str, Any]:
    """`document` with these schemas for properties that requests must have, or, with `required`, may have:
    then they must.

    The model's name, for example: nearly all requests would be refused for another one.
    """
    for name, schema in document["components"]["schemas"].items():
        musts = set(schema.get("required", ()))
        for field in (
            properties.keys() & schema.get("properties", {}).keys() if name.endswith("Request") else ()
        ):
            if required or field in musts:
                schema["properties"][field] = properties[field]
                schema["required"] = sorted(musts := musts | {field})
    return document


async def schemathesis(folder: Path, url: str, document: dict[str, Any], *arguments: str) -> str:
    """What it says; fails if it finds a fault. It runs in `folder`, the same way every time."""
    (folder / "openapi.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", url]
    command += ["--checks", ",".join(CHECKS), "--generation-deterministic", "--warnings=off", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(SECONDS_MAX):
            said = (await process.communicate())[0].decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said
    return said
