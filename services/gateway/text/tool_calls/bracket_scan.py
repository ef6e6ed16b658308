"""Where a bracketed value ends, in a text that comes in pieces."""

import re

_JSON = (re.compile(r'["{}\[\]]'), "{[", '"')
_PYTHON = (re.compile(r"""["'(){}\[\]]"""), "{[(", "\"'")


class BracketScan:
    """Counts brackets outside of strings; `depth` of them are open already. `python`: round brackets and
    single quotes count too."""

    def __init__(self, depth: int = 0, *, python: bool = False) -> None:
        self._depth = depth
        self._outside, self._opening, self._quotes = _PYTHON if python else _JSON
        self._string = ""  # the quote it began with, while inside of one
        self._escaped = False

    def end(self, text: str) -> int | None:
        """Where in `text`, which follows what was given before, the last open bracket is closed."""
        at = 0
        if self._escaped and text:
            self._escaped, at = False, 1
        while found := self._next(text, at):
            at = found.end()
            if found[0] == "\\":
                self._escaped = at == len(text)
                at += 1
            elif found[0] in self._quotes:
                self._string = "" if self._string else found[0]
            else:
                self._depth += 1 if found[0] in self._opening else -1
                if self._depth <= 0:
                    return at
        return None

    def _next(self, text: str, at: int) -> re.Match[str] | None:
        return (_INSIDE[self._string] if self._string else self._outside).search(text, at)


_INSIDE = {quote: re.compile(rf"[\\{quote}]") for quote in "\"'"}
