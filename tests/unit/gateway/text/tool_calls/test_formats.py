"""Calls are found in what each family writes, however the text is cut, and nothing of it is lost."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.text.answer import TextDelta, joined
from services.gateway.text.tool_calls.call_stream import CallStream
from services.gateway.text.tool_calls.piece import CallableTool, Content
from services.gateway.text.tool_calls.tool_use import ToolUse
from tests.unit.gateway.text.tool_calls.recorded import (
    CALLS,
    HERMES,
    LLAMA,
    MISTRAL,
    NAMES,
    NO_CALLS,
    PYTHONIC,
)

TOOLS = [CallableTool(name, {"type": "object"}) for name in sorted(NAMES)]
FORMATS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "pythonic": PYTHONIC}


def read(use: ToolUse, pieces: list[str], finish="stop") -> TextDelta:
    """The whole answer that `pieces`, one after another, are read as."""
    stream = CallStream(use)
    deltas = [stream.feed(TextDelta(piece, token_ids=(n,))) for n, piece in enumerate(pieces)]
    deltas.append(stream.feed(TextDelta("", finish)))
    return joined([delta for delta in deltas if delta is not None])


def found(answer: TextDelta) -> tuple[str, list[tuple[str | None, str]]]:
    return answer.text, [(call.name, call.arguments) for call in answer.calls]


def cuts(text: str):
    return st.lists(st.integers(0, len(text)), max_size=12).map(
        lambda places: [text[a:b] for a, b in itertools.pairwise([0, *sorted(places), len(text)])]
    )


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
def test_calls_are_found_whole_and_character_by_character(case) -> None:
    use = ToolUse(case.format, TOOLS)
    assert found(read(use, [case.text])) == (case.content, case.calls)
    assert found(read(use, list(case.text))) == (case.content, case.calls)


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
@settings(max_examples=20)
@given(data=st.data())
def test_where_the_text_is_cut_changes_nothing(case, data) -> None:
    pieces = data.draw(cuts(case.text))
    assert found(read(ToolUse(case.format, TOOLS), pieces)) == (case.content, case.calls)


@pytest.mark.parametrize(("form", "text"), NO_CALLS.values(), ids=NO_CALLS)
def test_what_is_no_call_comes_out_as_it_is(form, text) -> None:
    answers = [read(ToolUse(form, TOOLS), pieces) for pieces in ([text], list(text))]
    assert [found(answer) for answer in answers] == [(text, []), (text, [])]
    assert answers[0].finish == "stop"


JSON = ['{"name": "now", "arguments": {', '"a": 1', "}}", "}", "{", "[", "]", '"', "\\", ", ", "x", "é"]
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<tool", "[TOOL", "\n"]
PYTHON = ["now", "now(", ")", "; ", "<|python_start|>", "<|python_end|>", "a=", "'"]
FRAGMENTS = st.sampled_from([*JSON, *MARKS, *PYTHON])


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@settings(max_examples=150)
@given(data=st.data())
def test_any_text_is_read_alike_however_it_is_cut_and_without_calls_stays_whole(form, data) -> None:
    text = "".join(data.draw(st.lists(FRAGMENTS, max_size=14)))
    use = ToolUse(form, TOOLS)
    whole = found(read(use, [text]))
    assert found(read(use, data.draw(cuts(text)))) == whole
    assert found(read(use, list(text))) == whole
    if not whole[1]:
        assert whole[0] == text


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_text_that_cannot_be_a_call_is_not_held_back(form) -> None:
    parser = form.parser(NAMES)
    assert parser.feed("Hello, ") == [Content("Hello, ")]
    assert parser.feed("world!") == [Content("world!")]


@pytest.mark.parametrize("name", ["hermes: one", "llama: one", "mistral: names"])
def test_arguments_go_out_while_they_are_written(name) -> None:
    case = CALLS[name]
    stream = CallStream(ToolUse(case.format, TOOLS))
    deltas = [stream.feed(TextDelta(character)) for character in case.text]
    calls = [call for delta in deltas if delta for call in delta.calls]
    assert len(calls) > len(case.calls[0][1]) / 2
    assert [call.name for call in calls if call.name] == [name for name, _ in case.calls]


def test_each_call_has_an_id_of_its_own_and_the_answer_ends_for_the_calls() -> None:
    case = CALLS["hermes: words before, two calls"]
    answer = read(ToolUse(case.format, TOOLS), [case.text])
    first, second = (call.id for call in answer.calls)
    assert first != second
    assert first.startswith("call_")
    assert answer.finish == "tool_calls"
    assert read(ToolUse(case.format, TOOLS, "named"), [case.text]).finish == "stop"
    assert read(ToolUse(case.format, TOOLS), [case.text], "length").finish == "length"


def test_mistral_s_ids_are_those_that_its_templates_take() -> None:
    answer = read(ToolUse(MISTRAL, TOOLS), [CALLS["mistral: a list"].text])
    assert all(len(call.id) == 9 and call.id.isalnum() for call in answer.calls)


def test_only_the_first_call_is_given_to_who_wants_one() -> None:
    case = CALLS["hermes: words before, two calls"]
    answer = read(ToolUse(case.format, TOOLS, parallel=False), [case.text])
    assert found(answer) == (case.content, case.calls[:1])


def test_no_token_is_lost_while_text_is_held_back() -> None:
    case = CALLS["hermes: words before, two calls"]
    answer = read(ToolUse(case.format, TOOLS), list(case.text))
    assert answer.token_ids == tuple(range(len(case.text)))
