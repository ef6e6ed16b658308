"""Logging: one line per event, JSON for machines and text for people, with ids where they are known."""

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime

import pytest

from services.core.errors import BadRequest, ConfigError
from services.core.log import setup_logging

SENT = "what a client sent"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def root_logger_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("DIPTYCH_LOG_FORMAT", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []  # `force` closes what it finds, and pytest's handlers must survive
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


def test_outside_a_terminal_each_line_is_a_json_object() -> None:
    stream = io.StringIO()
    setup_logging("gateway", stream=stream)
    logging.getLogger("a.b").info("two\nlines %d", 7, extra={"request_id": "r1", "worker_id": "w1"})
    logging.getLogger("a.b").warning("plain")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert datetime.fromisoformat(first.pop("time")).tzinfo is not None
    assert first == {
        "level": "INFO",
        "service": "gateway",
        "logger": "a.b",
        "message": "two\nlines 7",
        "request_id": "r1",
        "worker_id": "w1",
    }
    assert second["level"] == "WARNING"
    assert "request_id" not in second


def test_an_exception_is_part_of_its_line() -> None:
    stream = io.StringIO()
    setup_logging("worker", stream=stream)
    try:
        raise ZeroDivisionError("broken")
    except ZeroDivisionError:
        logging.getLogger("x").exception("failed")
    (line,) = stream.getvalue().splitlines()
    assert "ZeroDivisionError: broken" in json.loads(line)["exception"]


def fail(sent: str) -> None:
    try:
        {}[sent]
    except KeyError as error:
        try:
            int(sent)
        except ValueError:
            raise BadRequest(f"you sent {sent}") from error


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_client_sent_is_in_no_traceback_unless_asked_for(monkeypatch, form: str) -> None:
    monkeypatch.setenv("DIPTYCH_LOG_FORMAT", form)
    for level, told in (("INFO", False), ("DEBUG", True)):
        stream = io.StringIO()
        setup_logging("gateway", level=level, stream=stream)
        try:
            fail(SENT)
        except BadRequest:
            logging.getLogger("x").exception("failed")
        assert (SENT in stream.getvalue()) is told
        for part in ("KeyError", "BadRequest", "direct cause", "in fail"):
            assert part in stream.getvalue()


def test_a_terminal_gets_readable_text() -> None:
    stream = Terminal()
    setup_logging("gateway", stream=stream)
    logging.getLogger("a").info("routed", extra={"request_id": "r1"})
    assert stream.getvalue().endswith(" INFO gateway routed (request_id=r1)\n")


@pytest.mark.parametrize(("chosen", "stream"), [("json", Terminal()), ("text", io.StringIO())])
def test_the_environment_overrides_the_format(
    chosen: str, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPTYCH_LOG_FORMAT", chosen)
    setup_logging("gateway", stream=stream)
    logging.getLogger("a").info("hello")
    assert stream.getvalue().startswith("{") == (chosen == "json")


def test_lines_below_the_level_are_dropped() -> None:
    stream = io.StringIO()
    setup_logging("gateway", level="warning", stream=stream)
    logging.getLogger("a").info("no")
    logging.getLogger("a").warning("yes")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["yes"]


def test_the_last_setup_wins_and_no_line_comes_twice() -> None:
    first, second = io.StringIO(), io.StringIO()
    setup_logging("one", stream=first)
    setup_logging("two", stream=second)
    logging.getLogger("a").info("hello")
    assert first.getvalue() == ""
    assert [json.loads(line)["service"] for line in second.getvalue().splitlines()] == ["two"]


def test_unknown_levels_and_formats_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="loud"):
        setup_logging("gateway", level="loud", stream=io.StringIO())
    monkeypatch.setenv("DIPTYCH_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="DIPTYCH_LOG_FORMAT must be text or json"):
        setup_logging("gateway", stream=io.StringIO())
