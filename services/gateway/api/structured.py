"""What a request says of its answer's form: OpenAI's response_format, and what vLLM's clients send.

At most one of them; `asked_grammar` says which, and what it asks for.
"""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, model_validator

from services.core.errors import BadRequest
from services.gateway.api.fields import Body
from services.gateway.text.grammar import Asked

_CHOICES_MAX = 1999  # as many as llguidance tells apart at one place
_Choices = Annotated[list[str], Field(min_length=1, max_length=_CHOICES_MAX, fail_fast=True)]
_Schema = dict[str, Any] | str


class JsonSchema(Body):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = Field(None, description="the answer always follows the schema, strict or not")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the type json_schema needs a json_schema")
        return self

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema and self.type == "json_schema" else None
        return {"type": "object"} if schema is None else schema


class StructuredOutputs(Body):
    """vLLM's; one of the first five."""

    json_: Annotated[_Schema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: _Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None

    REFUSED = {
        "structural_tag": (),
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
    }
    HARMLESS = {"disable_fallback"}


class Structured(Body):
    """Part of a request."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Schema | None = Field(None, description="a JSON schema")
    guided_regex: str | None = Field(None, description="the whole answer matches it")
    guided_choice: _Choices | None = Field(None, description="the answer is one of them")
    guided_grammar: str | None = Field(None, description="EBNF with a rule named root, or Lark")
    guided_json_object: bool | None = None
    guided_whitespace_pattern: str | None = Field(
        None, description="a regular expression: what may stand between the tokens of JSON"
    )

    def asked_grammar(self) -> tuple[Asked, str] | None:
        """And the parameter that asks for it. Raises BadRequest if several do, or for too long a text."""
        found = {param: (kind, value) for param, kind, value in self._forms() if value not in (None, False)}
        if not found:
            return None
        if len(found) > 1:
            first, second, *_ = found
            raise BadRequest(f"'{first}' and '{second}' both give the answer a form: leave one out.", second)
        ((param, (kind, value)),) = found.items()
        return _asked(kind, value, self._whitespace, param), param

    @property
    def _whitespace(self) -> str | None:
        if self.guided_whitespace_pattern is not None or self.structured_outputs is None:
            return self.guided_whitespace_pattern
        return self.structured_outputs.whitespace_pattern

    def _forms(self) -> list[tuple[str, str, Any]]:
        form = self.response_format
        return [
            ("response_format", "schema", form.schema_wanted if form else None),
            *_vllm_forms(
                "guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar
            ),
            ("guided_json_object", "schema", {"type": "object"} if self.guided_json_object else None),
            *_outputs_forms(self.structured_outputs),
        ]


def _outputs_forms(outputs: StructuredOutputs | None) -> list[tuple[str, str, Any]]:
    if outputs is None:
        return []
    name = "structured_outputs."
    return [
        *_vllm_forms(name, outputs.json_, outputs.regex, outputs.choice, outputs.grammar),
        (f"{name}json_object", "schema", {"type": "object"} if outputs.json_object else None),
    ]


def _vllm_forms(
    name: str, schema: _Schema | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> list[tuple[str, str, Any]]:
    return [
        (f"{name}json", "schema", schema),
        (f"{name}regex", "regex", regex),
        (f"{name}choice", "choice", choice),
        (f"{name}grammar", "grammar", grammar),
    ]


def _asked(kind: Any, value: Any, whitespace: str | None, param: str) -> Asked:
    try:
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        _ = (text + (whitespace or "")).encode()
        return Asked(kind, text, whitespace if kind == "schema" else None)
    except UnicodeEncodeError:
        raise BadRequest(f"'{param}' holds half of a surrogate pair; send valid Unicode.", param) from None
    except (RecursionError, OverflowError, msgspec.MsgspecError):
        problem = "is nested too deeply, or has numbers that are too large"
        raise BadRequest(f"'{param}' {problem}.", param) from None
