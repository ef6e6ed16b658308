"""The grammar of tool calls."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """How a format writes calls: `begin` body (`between` `begin` body)*, in llguidance's dialect of Lark (its
    docs/syntax.md)."""

    body: str
    rules: Sequence[str]  # that it needs
    begin: str = ""  # a marker; empty: calls are the whole answer
    first: str = ""  # without a marker: the character that tells such an answer from others
    between: str = '""'
    parallel: bool = False  # several bodies; False also for one that has several calls by itself

    def forced(self) -> str:
        """Nothing but calls."""
        more = "" if not self.parallel else f" ({self.between} {self.begin} body)*"
        return self._text(f"start: {self.begin} body{more}")

    def chosen(self) -> str:
        """Any text; but what begins as a call is one."""
        if not self.begin:
            more = "" if not self.parallel else f" ({self.between} body)*"
            return self._text(f"start: body{more} | OTHER", rf"OTHER: /(\s*[^\s\{self.first}](.|\n)*)?/")
        times = "*" if self.parallel else "?"
        if self.begin.startswith("<"):  # a special token
            return self._text(f"start: (TEXT {self.begin} body){times} TEXT", r"TEXT: /(.|\n)*/")
        begins = f"begins[lazy]: TEXT {self.begin}"
        return self._text(f"start: (begins body){times} rest", begins, "rest: TEXT", r"TEXT: /(.|\n)*/")

    def _text(self, *rules: str) -> str:
        return "\n".join([*rules, f"body: {self.body}", *self.rules, ""])
