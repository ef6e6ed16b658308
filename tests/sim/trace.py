"""The log of one simulated run: what happened when, and one digest over all of it."""

import hashlib

from tests.sim.loop import VirtualLoop


class Trace:
    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._digest = hashlib.blake2b(digest_size=8)
        self.lines: list[str] = []

    def note(self, who: str, what: str) -> None:
        line = f"{self._loop.time():10.4f}  {who:<10} {what}"
        self._digest.update(line.encode())
        self.lines.append(line)

    def log(self, who: str, what: str) -> None:
        """A line to read, which is not part of the digest."""
        self.lines.append(f"{self._loop.time():10.4f}  {who:<10} {what}")

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()
