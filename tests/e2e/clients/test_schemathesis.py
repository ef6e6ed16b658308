"""Requests that the OpenAPI document allows, to a whole cluster: workers answer none of them wrongly."""

from pathlib import Path

from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL
from tests.support.schemathesis_run import narrowed, schemathesis

FEW = {"type": "integer", "minimum": 1, "maximum": 3}  # a second's work is enough


async def test_what_the_document_allows_gets_an_answer_that_it_has(
    split: RunningCluster, tmp_path: Path
) -> None:
    async with split.http() as http:
        document = (await http.get("/openapi.json")).json()
    few = dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens", "n"), FEW)
    said = await schemathesis(
        tmp_path,
        split.url,
        narrowed(document, {"model": {"type": "string", "enum": [MODEL]}, **few}, required=True),
        "--mode=positive",
        "--phases=fuzzing",
        "--max-examples=12",
        "--include-path-regex=/v1/(chat/completions|completions|responses)$",
    )
    assert "Tested: 3\n" in said
