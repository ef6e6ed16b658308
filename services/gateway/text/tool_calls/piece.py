"""What parsers find in an answer, and what a format of tool calls must know."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from services.gateway.text.tool_calls.call_grammar import CallGrammar


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of the call that began last: part of a JSON text."""

    text: str


Piece = Content | CallBegins | Arguments


class ToolCallParser(Protocol):
    """Reads one answer. Where its text is cut into pieces changes nothing of what is found in it.

    Text is held back only while it may still belong to a call. What turns out not to be one comes out
    as content, every character of it.
    """

    def feed(self, text: str) -> list[Piece]: ...

    def flush(self) -> list[Piece]:
        """What was held back, once the answer is over."""
        ...


@dataclass(frozen=True, slots=True)
class CallableTool:
    """One of a request's tools, as far as its calls matter."""

    name: str
    parameters: dict[str, Any]  # a JSON schema of an object
    strict: bool = False


# A marker as a term of a grammar: a special token, or text.
Written = Callable[[str], str]


class ToolFormat(Protocol):
    """How a family of models writes calls."""

    @property
    def markers(self) -> Collection[str]:
        """What may be a special token in the family's tokenizers, and must stay in the text."""
        ...

    def parser(self, names: Collection[str]) -> ToolCallParser:
        """For one answer. A call of anything but `names` is no call."""
        ...

    def new_call_id(self) -> str: ...

    def grammar(self, tools: Sequence[CallableTool], written: Written, *, parallel: bool) -> CallGrammar:
        """Of calls of `tools`; if `parallel`, of several."""
        ...
