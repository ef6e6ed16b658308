"""Logging: standard `logging`, one line per event on stderr.

A terminal gets readable text, anything else gets JSON (one object per line, for log collectors);
DIPTYCH_LOG_FORMAT=text|json overrides. Lines about a request or a worker carry its id, and those about
a request the name of its API key:
`logger.info("routed", extra={"request_id": ..., "worker_id": ...})`.

Nothing that a client sends is logged: no prompt, answer or key. At DEBUG the messages of unexpected
exceptions are shown, which may quote a request.
"""

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO

from services.core.errors import ConfigError
from services.core.traceback_text import without_messages

CONTEXT_FIELDS = ("request_id", "worker_id", "key")


def setup_logging(service: str, *, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send all logging of this process to `stream` (default stderr) as lines of `service`.

    May be called again: the last call wins. Raises ConfigError for an unknown level or format.
    """
    names = logging.getLevelNamesMapping()
    if level.upper() not in names:
        raise ConfigError(f"unknown log level {level!r}; use one of {', '.join(names)}")
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_formatter(service, stream, tells_all=names[level.upper()] <= logging.DEBUG))
    logging.basicConfig(level=names[level.upper()], handlers=[handler], force=True)
    logging.captureWarnings(True)
    # httpx logs every request at INFO, which would be one line per readiness probe.
    for chatty in ("httpx", "httpcore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _formatter(service: str, stream: TextIO, *, tells_all: bool) -> logging.Formatter:
    default = "text" if stream.isatty() else "json"
    chosen = os.environ.get("DIPTYCH_LOG_FORMAT") or default
    if chosen not in ("text", "json"):
        raise ConfigError(f"environment: DIPTYCH_LOG_FORMAT must be text or json, not {chosen!r}")
    kind = TextFormatter if chosen == "text" else JsonFormatter
    return kind(service, tells_all=tells_all)


class _Formatter(logging.Formatter):
    def __init__(self, service: str, *, tells_all: bool) -> None:
        super().__init__()
        self._service, self._tells_all = service, tells_all

    def formatException(self, ei: Any) -> str:
        if self._tells_all or ei[1] is None:
            return super().formatException(ei)
        return without_messages(ei[1])


class JsonFormatter(_Formatter):
    """{"time", "level", "service", "logger", "message"} plus the context fields that were given, and
    `exception` (a traceback) when there is one. Times are UTC, ISO 8601, in milliseconds."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **_context(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextFormatter(_Formatter):
    """`12:00:00.123 INFO gateway routed (request_id=r1)`, local time, a traceback below."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created)) + f".{record.msecs:03.0f}"
        context = " ".join(f"{name}={value}" for name, value in _context(record).items())
        line = f"{clock} {record.levelname} {self._service} {record.getMessage()}"
        if context:
            line += f" ({context})"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _context(record: logging.LogRecord) -> dict[str, str]:
    return {name: str(vars(record)[name]) for name in CONTEXT_FIELDS if vars(record).get(name) is not None}
