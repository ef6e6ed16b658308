"""What clients ask for becomes a grammar that accepts exactly that; through the trial's own functions."""

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from services.gateway.text.grammar import Asked
from services.gateway.text.grammar_process import tried
from services.model.grammar import GrammarVocabulary, compile_grammar


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> LLTokenizer:
    return GrammarVocabulary.of(tokenizer).load()


@pytest.fixture(scope="module")
def accepts(vocabulary: LLTokenizer):
    def accepts(asked: Asked, text: str) -> bool:
        """Whether `text` is a whole answer."""
        reply = tried(vocabulary, asked)
        assert not reply.error
        matcher: LLMatcher = compile_grammar(vocabulary, reply.grammar)
        ids = vocabulary.tokenize_str(text, parse_special=True)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return accepts


def schema(value, whitespace: str | None = None) -> Asked:
    return Asked("schema", json.dumps(value), whitespace)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ('{"name":"Ada","age":36}', True),
        ('{\n    "name": "Ada \\n 日",\n    "age": 36\n}', True),
        ('{"age":36,"name":"Ada"}', False),  # properties come in the schema's order
        ('{"name":"Ada"}', False),
        ('{"name":"Ada","age":36,"x":1}', False),
        ('{"name":"Ada","age":3.5}', False),
        ('{"name":"Ada",' + " " * 41 + '"age":36}', False),
        ('{"name":"Ada","age":36} ', False),
    ],
)
def test_an_object_follows_its_schema(accepts, text: str, accepted: bool) -> None:
    assert accepts(schema(PERSON), text) == accepted


def test_what_may_stand_between_the_tokens_of_json_can_be_chosen(accepts) -> None:
    assert accepts(schema(PERSON, ""), '{"name":"Ada","age":36}')
    assert not accepts(schema(PERSON, ""), '{"name": "Ada","age":36}')
    assert accepts(schema(PERSON, " *"), '{"name":' + " " * 100 + '"Ada","age":36}')


def test_formats_that_nobody_knows_and_overlapping_alternatives_are_no_obstacle(accepts) -> None:
    asked = schema(
        {
            "oneOf": [
                {"type": "object", "properties": {"format": {"type": "string", "format": "path"}}},
                {"type": "string", "format": "date"},
            ]
        }
    )
    assert accepts(asked, '{"format": "/a"}')
    assert accepts(asked, '"1999-12-31"')
    assert not accepts(asked, '"/a"')
    assert accepts(schema({"const": {"format": "path"}}), '{"format":"path"}')


@pytest.mark.parametrize("text", ['say "é"', "a\\b", "new\nline", "\x7f", "😀", "", "/x/"])
def test_any_text_can_be_a_choice(accepts, text: str) -> None:
    asked = Asked("choice", json.dumps(["other", text]))
    assert accepts(asked, text)
    assert accepts(asked, "other")
    assert not accepts(asked, "other" + (text or " "))


def test_a_regular_expression_matches_the_whole_answer(accepts) -> None:
    asked = Asked("regex", r"\d{3}/[a-z\"]+é?")
    assert accepts(asked, '123/a"bé')
    assert not accepts(asked, "123/")
    assert not accepts(asked, "x123/a")
    assert not accepts(asked, "٣٣٣/a")


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "SELECT " column ("," column)*\ncolumn ::= "a" | "b" # a comment\n',
        '?start: "SELECT " column ("," column)*\ncolumn: "a" | "b"',
    ],
)
def test_grammars_are_ebnf_or_lark(accepts, grammar: str) -> None:
    asked = Asked("grammar", grammar)
    assert accepts(asked, "SELECT a,b,a")
    assert not accepts(asked, "SELECT c")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (Asked("schema", "{"), "Expecting"),
        (Asked("schema", "[]"), "must be an object"),
        (schema({"type": "strange"}), "strange"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"type": "integer", "minimum": 3, "maximum": 2}), "minimum"),
        (schema({"$ref": "http://example.org/schema"}), "example.org"),
        (schema({"$ref": "#/$defs/missing"}), "missing"),
        (schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "no text"),
        (schema(PERSON, "("), "regex"),
        (Asked("regex", "(a"), "unclosed"),
        (Asked("regex", "(?=a)b"), "look-around"),
        (Asked("regex", "[^\\s\\S]"), "no text"),
        (Asked("regex", "((a{100}){100}){100}"), "too many"),
        (Asked("grammar", 'root ::= "a" missing'), "missing"),
        (Asked("grammar", 'other ::= "a"'), "root"),
        (Asked("grammar", "start: missing"), "missing"),
        (Asked("grammar", "root ::= " + "(" * 5000), "nested too deeply"),
        (Asked("lark", 'start: "a" <nobody>'), "special token"),
        (Asked("lark", "start: " + "(" * 5000), "nested"),
    ],
)
def test_what_no_answer_can_follow_is_refused_with_the_reason(vocabulary, asked: Asked, reason: str) -> None:
    reply = tried(vocabulary, asked)
    assert reason in reply.error
    assert len(reply.error) <= 500
    assert reply.grammar == ""


def test_an_ambiguous_grammar_comes_to_an_end_before_its_masks_take_long(vocabulary, tokenizer) -> None:
    matcher = compile_grammar(vocabulary, 'start: a\na: a a | "x" | "xy" | a "z" a | ')
    (token,) = tokenizer.encode("x", add_special_tokens=False)
    for _ in range(200):
        matcher.compute_bitmask()
        if matcher.is_error():
            break
        matcher.consume_token(token)
    assert "Too many items" in matcher.get_error()
