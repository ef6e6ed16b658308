"""The tools of one request: which may be called, how calls are found in its answers or forced."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from services.gateway.text.tool_calls.piece import CallableTool, ToolCallParser, ToolFormat, Written


@dataclass(frozen=True, slots=True)
class ToolUse:
    format: ToolFormat
    tools: Sequence[CallableTool]  # that may be called
    choice: Literal["auto", "required", "named"] = "auto"
    parallel: bool = True  # several calls in one answer

    def grammar(self, written: Written) -> str:
        """What the answer must match; empty if the model decides."""
        if self.choice == "auto":
            return ""
        return self.format.grammar(self.tools, written, parallel=self.parallel)

    def parser(self) -> ToolCallParser:
        return self.format.parser({tool.name for tool in self.tools})
