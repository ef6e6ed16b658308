"""A marker in a text that comes in pieces."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seen:
    before: str
    after: str | None  # behind the marker; None: it has not come


class Marker:
    """Holds back the longest end of the text that may still become the marker."""

    def __init__(self, marker: str) -> None:
        self._marker = marker
        self._held = ""

    def feed(self, text: str) -> Seen:
        text = self._held + text
        before, found, after = text.partition(self._marker)
        if found:
            self._held = ""
            return Seen(before, after)
        length = self._held_length(text)
        self._held = text[len(text) - length :]
        return Seen(text[: len(text) - length], None)

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _held_length(self, text: str) -> int:
        for length in range(min(len(self._marker) - 1, len(text)), 0, -1):
            if self._marker.startswith(text[-length:]):
                return length
        return 0
