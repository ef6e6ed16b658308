"""Forced calls, and strict ones: the grammar takes what the family's parser reads, and nothing else."""

import json

import msgspec
import pytest
from llguidance import LLMatcher, LLTokenizer

from services.gateway.text.grammar import Asked, grammar_text
from services.gateway.text.tool_calls.hermes import HermesFormat
from services.gateway.text.tool_calls.llama_json import LlamaJsonFormat
from services.gateway.text.tool_calls.mistral import MistralFormat
from services.gateway.text.tool_calls.piece import CallableTool
from services.gateway.text.tool_calls.pythonic import PythonicFormat
from services.gateway.text.tool_calls.tool_use import ToolUse
from tests.unit.gateway.text.tool_calls.test_formats import found, read

POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
WEATHER = CallableTool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["C", "F"]},
            "where": {"$ref": "#/$defs/Point"},
        },
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"Point": POINT},
    },
    strict=True,
)
NOW = CallableTool("now", {"type": "object", "properties": {}, "additionalProperties": False})
ARGUMENTS = '{"city": "Paris, \\"日本\\"", "unit": "C", "where": {"x": 1.5}}'
FORMATS = {
    "hermes": (
        HermesFormat(),
        f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
        '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    "llama": (
        LlamaJsonFormat(),
        f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}',
        '; {"name": "now", "parameters": {}}',
    ),
    "mistral": (
        MistralFormat(),
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ARGUMENTS}}}',
        ', {"name": "now", "arguments": {}}',
    ),
    "mistral, named": (
        MistralFormat(named=True),
        f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}",
        "[TOOL_CALLS]now[ARGS]{}",
    ),
    "pythonic": (
        PythonicFormat(),
        '[get_weather(city="Paris, \\"日本\\"", unit="C", where={"x": 1.5})',
        ", now()",
    ),
}
LISTS = {"mistral", "pythonic"}


@pytest.fixture(scope="module")
def takes(tokenizer):
    """Whether a grammar takes a text, as a whole."""
    grammar_tokenizer = LLTokenizer(tokenizer.backend.to_str(), eos_token=sorted(tokenizer.end_token_ids))

    def takes(grammar: str, text: str) -> bool:
        matcher = LLMatcher(grammar_tokenizer, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return takes


def written(name: str, *texts: str) -> str:
    return "".join(texts) + ("]" if name in LISTS else "")


@pytest.mark.parametrize("name", FORMATS)
def test_a_forced_answer_is_calls_in_the_family_s_own_way(takes, name) -> None:
    form, first, second = FORMATS[name]
    use = ToolUse(form, [WEATHER, NOW], "required")
    grammar = use.grammar(json.dumps)
    assert takes(grammar, written(name, first))
    assert takes(grammar, written(name, first, second))
    assert not takes(grammar, "It is cold.")
    assert not takes(grammar, "")
    assert not takes(grammar, written(name, first.replace('"C"', '"K"')))
    assert not takes(grammar, written(name, first.replace("get_weather", "get_whether")))
    assert not takes(grammar, written(name, first.replace("1.5", '"x"')))
    assert found(read(use, [written(name, first, second)])) == (
        "",
        [("get_weather", ARGUMENTS), ("now", "{}")],
    )


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_is_forced_where_one_is_wanted(takes, name) -> None:
    form, first, second = FORMATS[name]
    grammar = ToolUse(form, [WEATHER, NOW], "required", parallel=False).grammar(json.dumps)
    assert takes(grammar, written(name, first))
    assert not takes(grammar, written(name, first, second))


@pytest.mark.parametrize("name", FORMATS)
def test_a_strict_tool_binds_calls_that_the_model_chose_to_make(takes, name) -> None:
    form, first, second = FORMATS[name]
    grammar = ToolUse(form, [WEATHER, NOW]).grammar(json.dumps)
    for text in ("", "It is cold.", "a < b\n[1] {", written(name, first), written(name, first, second)):
        assert takes(grammar, text), text
    assert not takes(grammar, written(name, first.replace('"C"', '"K"')))
    assert ToolUse(form, [NOW]).grammar(json.dumps) == ""


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral, named"])
def test_a_strict_tool_leaves_words_before_and_after_calls(takes, name) -> None:
    form, first, _ = FORMATS[name]
    grammar = ToolUse(form, [WEATHER, NOW]).grammar(json.dumps)
    assert takes(grammar, f"Let me see.\n{written(name, first)} Done.")


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral, named"])
def test_a_marker_may_be_a_special_token(takes, tokenizer, name) -> None:
    form, first, _ = FORMATS[name]
    marker = next(iter(form.markers))
    special = {marker: ("<[6]>", "<filename>")}
    for choice in ("auto", "required"):
        grammar = ToolUse(form, [WEATHER, NOW], choice).grammar(
            lambda text: special[text][0] if text in special else json.dumps(text)
        )
        assert takes(grammar, written(name, first.replace(marker, "<filename>")))
        assert not takes(grammar, written(name, first.replace(marker, "<reponame>"))) or choice == "auto"


def test_every_choice_of_optional_arguments_can_be_written_in_python(takes) -> None:
    grammar = ToolUse(PythonicFormat(), [WEATHER, NOW], "required").grammar(json.dumps)
    for arguments in ('city="a"', 'city="a", unit="F"', 'city="a", where={"x": 1}'):
        assert takes(grammar, f"[get_weather({arguments})]"), arguments
    for arguments in ("", 'unit="F"', 'unit="F", city="a"', 'city="a", more=1'):
        assert not takes(grammar, f"[get_weather({arguments})]"), arguments


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "asked",
    [
        Asked("schema", '{"type": "object", "properties": {"sum": {"type": "integer"}}}'),
        Asked("schema", '{"type": "object"}'),
        Asked("regex", r".sum.*"),
    ],
    ids=["schema", "any object", "regex"],
)
def test_an_answer_of_some_form_may_be_calls_instead(takes, name, asked) -> None:
    form, first, second = FORMATS[name]
    calls = ToolUse(form, [WEATHER, NOW]).forced(json.dumps)
    grammar = grammar_text(msgspec.structs.replace(asked, calls=calls))
    assert takes(grammar, '{"sum": 3}' if asked.kind == "schema" else "(sum) 3")
    assert takes(grammar, written(name, first, second))
    assert not takes(grammar, "It is cold.")
    assert not takes(grammar, written(name, first.replace('"C"', '"K"')))
