"""Chunks of plain text, beside what pydantic makes of the same deltas."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.api.formats import ChatFormat, CompletionFormat, as_json
from services.gateway.api.text_chunks import TextChunks, is_only_text
from services.gateway.text.answer import TextDelta

FORMATS = [ChatFormat, CompletionFormat]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@pytest.mark.parametrize("form", FORMATS)
@given(texts=st.lists(st.tuples(UNICODE, st.integers(0, 3)), min_size=1, max_size=5), model=UNICODE)
def test_they_are_the_same_to_the_last_byte(form, texts, model) -> None:
    format = form("r", model)
    general = lambda delta: as_json(format.chunk(delta))  # noqa: E731
    chunks = TextChunks(general)
    for text, choice in texts:
        assert chunks.json(TextDelta(text, choice=choice)) == general(TextDelta(text, choice=choice))


@pytest.mark.parametrize("form", FORMATS)
def test_every_control_character_is_escaped_as_pydantic_does(form) -> None:
    format = form("r", "m")
    chunks = TextChunks(lambda delta: as_json(format.chunk(delta)))
    delta = TextDelta("".join(map(chr, range(0x100))) + '\\"/\u2028\u2029\ufeff👍')
    assert chunks.json(delta) == as_json(format.chunk(delta))
    assert json.loads(chunks.json(delta))


def test_whatever_has_more_than_text_is_not_only_text() -> None:
    assert is_only_text(TextDelta("a", token_ids=(1,), choice=2))
    assert not is_only_text(TextDelta(""))
    assert not is_only_text(TextDelta("a", "stop"))
    assert not is_only_text(TextDelta("a", tokens=((1, 0, None),)))
