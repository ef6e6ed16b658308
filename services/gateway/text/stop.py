"""Stop strings: found in the text, across the borders of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Found:
    text: str  # to give to the client
    stopped: bool  # a stop string was completed; `text` ends before it, or with it if that is wanted


class StopMatcher:
    """Holds back the longest end of the text that may still become a stop string."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops, self._include = tuple(stops), include
        self._held_max = max(map(len, stops), default=1) - 1
        self._held = ""

    def feed(self, text: str) -> Found:
        """Take the next piece of text. After `stopped` the matcher is done."""
        text = self._held + text
        first = self._first_stop(text)
        if first is not None:
            end, begin = first
            self._held = ""
            return Found(text[: end if self._include else begin], True)
        keep = self._held_length(text)
        self._held = text[len(text) - keep :]
        return Found(text[: len(text) - keep], False)

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> tuple[int, int] | None:
        """Where the stop string that is completed first ends and begins; of several, the longest one."""
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        return min(found) if found else None

    def _held_length(self, text: str) -> int:
        for length in range(min(self._held_max, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
