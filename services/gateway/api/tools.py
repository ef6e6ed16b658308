"""The tools that a chat request offers the model, and which of them it is to use."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from services.gateway.api.fields import Body
from services.gateway.api.unicode_text import Text

TOOLS_MAX = 128  # as OpenAI

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _of_an_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise ValueError('parameters must be a JSON schema of type "object"')
    if not isinstance(schema.get("properties", {}), dict):
        raise ValueError("the properties of an object schema must be an object")
    return schema


def _different(tools: list["Tool"]) -> list["Tool"]:
    names: set[str] = set()
    for tool in tools:
        if tool.function.name in names:
            raise ValueError(f"two tools have the name {tool.function.name!r}")
        names.add(tool.function.name)
    return tools


class Function(Body):
    name: FunctionName
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_of_an_object)] | None = Field(
        None, description="a JSON schema; default: no parameters"
    )
    strict: bool | None = Field(
        None, description="calls that the model makes by itself follow the schema too"
    )

    @property
    def shown_parameters(self) -> dict[str, Any]:
        return {"type": "object", "properties": {}} if self.parameters is None else self.parameters

    @property
    def forced_parameters(self) -> dict[str, Any]:
        """What forced calls follow: nothing that the schema does not speak of, unless it asks for that."""
        closed = {"additionalProperties": False} if "properties" in self.shown_parameters else {}
        return {"type": "object", **closed, **self.shown_parameters}


class Tool(Body):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As models are trained with them, in the order of keys that they know."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        return {
            "type": self.type,
            "function": {**function, "parameters": self.function.shown_parameters},
        }


class FunctionReference(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionReference


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=TOOLS_MAX)]


class AllowedToolsChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


Tools = Annotated[list[Tool], Field(max_length=TOOLS_MAX, fail_fast=True), AfterValidator(_different)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice
