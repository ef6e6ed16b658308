"""The grammar of an answer: what clients ask for as llguidance's text (SamplingParams.grammar).

Everything here is only text. `services/gateway/text/grammars.py` tries it, within bounds, before any work is
done for the request. Its Lark is llguidance's dialect (docs/syntax.md in its repository). Where a grammar is
complete the model's own end token may come; a grammar does not name it.
"""

import json
from typing import Any, Literal

import msgspec

# Between JSON's tokens: enough to indent, too little for a model that loses itself in spaces.
WHITESPACE_PATTERN = r"[ \t\n\r]{0,40}"
# JSON Schema lets a validator ignore formats that it does not know; llguidance refuses them.
_KNOWN_FORMATS = {
    *("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
}
_DATA = {"const", "enum", "default", "examples"}  # their values are no schemas


class Asked(msgspec.Struct, frozen=True):
    """`text`: by `kind` a JSON schema, a regular expression, a JSON list of texts, a grammar as clients of
    vLLM write it (Lark, or EBNF with a rule `root`), or llguidance's Lark."""

    kind: Literal["schema", "regex", "choice", "grammar", "lark"]
    text: str
    whitespace: str | None = None  # of a schema: a regular expression for what may stand between its tokens
    # What the answer may be instead: tool calls, in llguidance's Lark, the rule `start` in the first line.
    calls: str = ""

    @property
    def characters(self) -> int:
        return len(self.text) + len(self.whitespace or "") + len(self.calls)


def grammar_text(asked: Asked) -> str:
    """May take a while and recurse deeply. Raises ValueError with what is wrong."""
    text = _own_text(asked)
    return _or_calls(text, asked.calls) if asked.calls else text


def _or_calls(text: str, calls: str) -> str:
    """An answer, or tool calls instead."""
    start, rules = calls.split("\n", 1)
    if text.startswith('{"grammars":['):
        (answer,) = json.loads(text)["grammars"]
    else:
        answer = {"lark_grammar": text}
    whole = {"lark_grammar": f"{start} | @answer\n{rules}"}
    return _json({"grammars": [whole, {"name": "answer", **answer}]})


def _own_text(asked: Asked) -> str:
    match asked.kind:
        case "schema":
            return _json({"grammars": [{"json_schema": _schema(asked.text, asked.whitespace)}]})
        case "regex":
            return _json({"grammars": [{"lark_grammar": f"start: /{_between_slashes(asked.text)}/"}]})
        case "choice":
            return "start: " + " | ".join(map(json.dumps, json.loads(asked.text)))
        case "grammar":
            return _from_ebnf(asked.text) if "::=" in asked.text else asked.text
        case "lark":
            return asked.text


def followable(schema: dict[str, Any], **options: object) -> dict[str, Any]:
    """The schema as llguidance is to read it, with its options for JSON. Where the parts of a oneOf overlap
    it is read as anyOf."""
    return {**_without_unknown_formats(schema), "x-guidance": {"coerce_one_of": True, **options}}


def _schema(text: str, whitespace: str | None) -> dict[str, Any]:
    schema = json.loads(text)
    if not isinstance(schema, dict):
        raise ValueError("a schema must be an object")
    return followable(schema, whitespace_pattern=WHITESPACE_PATTERN if whitespace is None else whitespace)


def _without_unknown_formats(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_unknown_formats(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: part if key in _DATA else _without_unknown_formats(part)
        for key, part in schema.items()
        if key != "format" or not isinstance(part, str) or part in _KNOWN_FORMATS
    }


def _between_slashes(regex: str) -> str:
    from llguidance import regex_to_lark  # only the process that tries grammars loads it

    return regex_to_lark(regex, "d")  # \d is an ASCII digit


def _from_ebnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # it raises bare Exception
        raise ValueError(str(error)) from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
