"""docs/openai.md names what requests may have: all of it, and nothing else."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from services.gateway.api.fields import Body
from services.gateway.api.messages import ChatMessage
from services.gateway.api.responses_api.request import ResponsesRequest
from services.gateway.api.schema import (
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingsRequest,
    StreamOptions,
)
from services.gateway.api.structured import StructuredOutputs
from services.gateway.api.tokenization import DetokenizeRequest, TokenizeChat, TokenizeText

PAGE = Path(__file__).resolve().parents[4] / "docs/openai.md"


@pytest.fixture
def network() -> bool:
    return False


# The headings of the tables that tell of each body.
SECTIONS: dict[tuple[str, ...], tuple[type[Body], ...]] = {
    ("Of both", "Chat only"): (ChatCompletionRequest,),
    ("Of both", "Completions only"): (CompletionRequest,),
    ("Messages",): (ChatMessage,),
    ("Streams",): (StreamOptions,),
    ("Structured outputs",): (StructuredOutputs,),
    ("Responses",): (ResponsesRequest,),
    ("Tokenize",): (TokenizeText, TokenizeChat),
    ("Detokenize",): (DetokenizeRequest,),
    ("Embeddings",): (EmbeddingsRequest,),
}


def told(heading: str) -> dict[str, str]:
    """What the table below a heading says of each name: the cell after it."""
    section = re.search(rf"^###? {heading}\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", section[1], re.MULTILINE)
    return {name: cell for names, cell in rows for name in re.findall(r"`(\w+)`", names)}


def fields(bodies: Iterable[type[Body]]) -> set[str]:
    return {info.alias or name for body in bodies for name, info in body.model_fields.items()}


@pytest.mark.parametrize(("headings", "bodies"), SECTIONS.items(), ids=str)
def test_every_name_that_a_body_knows_is_there_and_no_other(
    headings: tuple[str, ...], bodies: tuple[type[Body], ...]
) -> None:
    named = {name: cell for heading in headings for name, cell in told(heading).items()}
    refused = {name for body in bodies for name in body.REFUSED}
    harmless = {name for body in bodies for name in body.HARMLESS}
    assert set(named) == fields(bodies) | refused | harmless
    assert {name for name in refused - fields(bodies) if not named[name].startswith("refused")} == set()
    assert {name for name in harmless if not named[name].startswith("accepted")} == set()


async def test_every_path_is_there(cluster) -> None:
    document = (await cluster.http.get("/openapi.json")).json()
    text = PAGE.read_text()
    named = {path: f"{path.replace('{model_id}', '{id}')}`" for path in document["paths"]}
    assert [path for path, name in named.items() if name not in text] == []
