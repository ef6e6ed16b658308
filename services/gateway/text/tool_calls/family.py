"""Which format of tool calls a model has, as its chat template tells."""

from dataclasses import dataclass
from typing import Literal

from services.gateway.text.tool_calls.hermes import HermesFormat
from services.gateway.text.tool_calls.llama_json import LlamaJsonFormat
from services.gateway.text.tool_calls.mistral import MistralFormat
from services.gateway.text.tool_calls.piece import ToolFormat
from services.gateway.text.tool_calls.pythonic import PythonicFormat
from services.model.chat_template import ChatTemplate, knows

ToolParserName = Literal["auto", "hermes", "llama3_json", "pythonic", "mistral"]

FORMATS: dict[ToolParserName, ToolFormat] = {
    "hermes": HermesFormat(),
    "llama3_json": LlamaJsonFormat(),
    "pythonic": PythonicFormat(),
    "mistral": MistralFormat(),
}


@dataclass(frozen=True, slots=True)
class ToolFamily:
    format: ToolFormat
    # The template does not write tools, or in a way whose calls we could not read: they are described
    # in the system message instead, in Hermes' words.
    plain: bool


def family_of(template: ChatTemplate, name: ToolParserName = "auto") -> ToolFamily:
    """`name` is the operator's word against what the template looks like."""
    source = template.source(tools=True) or ""
    if name == "mistral" or (name == "auto" and "[TOOL_CALLS]" in source):
        return ToolFamily(MistralFormat(named="[ARGS]" in source), plain=False)
    if name != "auto":
        return ToolFamily(FORMATS[name], plain=not knows(source, "tools"))
    seen = _seen_in(source) if knows(source, "tools") else None
    return ToolFamily(seen or FORMATS["hermes"], plain=seen is None)


def _seen_in(source: str) -> ToolFormat | None:
    if "<tool_call>" in source:
        # Some models write XML between these marks, not JSON.
        return None if "<function=" in source or "<arg_key>" in source else FORMATS["hermes"]
    if "<|python_start|>" in source or "func_name1(params_name1" in source:
        return FORMATS["pythonic"]
    if '"parameters"' in source:
        return FORMATS["llama3_json"]
    return None
