"""The log of one simulated run: what happened when, and one digest over all of it."""

import hashlib
import logging
from collections import Counter

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


_EVENTS_IN_LOGS = {
    "stood still": "new_epochs",
    "is overdue": "overdue_engines",
    "and is killed": "hung_engines",
    "handed": "hand_overs",
    "role changed": "role_changes",
}


class TracedLogs(logging.Handler):
    """Puts the production code's log lines into the trace."""

    def __init__(self, trace: Trace, events: Counter[str], level: int) -> None:
        super().__init__(level)
        self._trace, self._events = trace, events

    def emit(self, record: logging.LogRecord) -> None:
        for words, name in _EVENTS_IN_LOGS.items():
            self._events[name] += words in record.msg
        who = getattr(record, "worker_id", None) or record.name.rsplit(".", 1)[1]
        about = f"{record.request_id}: " if hasattr(record, "request_id") else ""
        self._trace.log(str(who), about + record.getMessage())

    def __enter__(self) -> None:
        root = logging.getLogger("services")
        self._before = (root.level, root.propagate)
        root.setLevel(self.level)
        root.propagate = False
        root.addHandler(self)

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger("services")
        root.removeHandler(self)
        root.level, root.propagate = self._before
