"""Outside a terminal, what goes on is told in a few plain lines on stderr."""

import pytest

from services.launch.display import Display


def test_progress_is_a_line_per_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Display().download("downloading m") as progress:
        for percent in range(101):
            progress(percent * 1_000_000, 100_000_000)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0] == "downloading m: 0 of 100 MB"
    assert lines[-1] == "downloading m: 100 of 100 MB"
    assert 10 <= len(lines) <= 12
    assert captured.out == ""


def test_nothing_is_told_about_a_download_that_is_not_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with Display().download("downloading m"):
        pass
    assert capsys.readouterr().err == ""


def test_each_part_that_gets_ready_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Display().waiting(["a", "b"]) as ready:
        ready("b")
        ready("a")
    assert capsys.readouterr().err.splitlines() == ["b ready", "a ready"]


def test_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Display().line("[red] :smile: " + "x" * 200)
    assert capsys.readouterr().err == "[red] :smile: " + "x" * 200 + "\n"
