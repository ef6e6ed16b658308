"""The tools of one request: which may be called, how calls are found in its answers or forced."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from services.gateway.text.tool_calls.piece import CallableTool, ToolCallParser, ToolFormat, Written

_ANY = {"type": "object"}


@dataclass(frozen=True, slots=True)
class ToolUse:
    format: ToolFormat
    tools: Sequence[CallableTool]  # that may be called
    choice: Literal["auto", "required", "named"] = "auto"
    parallel: bool = True  # several calls in one answer

    def grammar(self, written: Written) -> str:
        """What the answer must match; empty if the model decides. Calls of a strict tool follow its schema
        also where the model decides whether to call."""
        if self.choice != "auto":
            return self.forced(written)
        if not any(tool.strict for tool in self.tools):
            return ""
        tools = [tool if tool.strict else replace(tool, parameters=_ANY) for tool in self.tools]
        return self.format.grammar(tools, written, parallel=self.parallel).chosen()

    def forced(self, written: Written) -> str:
        """Nothing but calls."""
        return self.format.grammar(self.tools, written, parallel=self.parallel).forced()

    def parser(self) -> ToolCallParser:
        return self.format.parser({tool.name for tool in self.tools})
