"""Building the C++ kernels: once, whole, and with a reason where it cannot be done."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu.build import LEVELS, KernelsUnavailable, build, processor_level

COMPILER = """#!{python}
import pathlib, sys, time
time.sleep(0.2)
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("built")
with open(pathlib.Path(__file__).parent / "runs", "a") as runs:
    runs.write("x")
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that takes a compiler's arguments and writes down that it was run."""
    return install(tmp_path / "compiler", COMPILER.format(python=sys.executable), monkeypatch)


def install(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    return path


def test_a_library_is_built_once_per_level(compiler: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    paths = [build(folder, "plain"), build(folder, "plain"), build(folder, "avx2")]
    assert [path.read_text() for path in paths] == ["built"] * 3
    assert paths[0] == paths[1] != paths[2]
    assert (tmp_path / "runs").read_text() == "xx"


def test_processes_that_build_at_once_all_get_a_whole_library(compiler: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kernels.cpu.build import build\n"
        "assert build(Path(sys.argv[1]), 'plain').read_text() == 'built'"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "kernels")]
    root = Path(__file__).resolve().parents[2]
    started = [subprocess.Popen(command, cwd=root) for _ in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 1
    assert (tmp_path / "runs").read_text() == "x", "one built, the others waited"


def test_another_chosen_compiler_builds_another_library(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(tmp_path / "kernels", "plain")
    install(tmp_path / "other", COMPILER.format(python=sys.executable), monkeypatch)
    assert build(tmp_path / "kernels", "plain") != first


def test_what_is_built_needs_no_compiler_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    found = tmp_path / "bin" / "c++"
    found.parent.mkdir()
    install(found, COMPILER.format(python=sys.executable), monkeypatch)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(found.parent))
    builds: list[str] = []
    built = build(tmp_path / "kernels", "plain", on_build=lambda: builds.append("now"))
    found.unlink()
    assert build(tmp_path / "kernels", "plain", on_build=lambda: builds.append("again")) == built
    assert builds == ["now"], "whoever waits is told once"


def test_a_failed_build_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = '#!/bin/sh\necho "unknown option -std=c++20" >&2\nexit 1\n'
    install(tmp_path / "compiler", script, monkeypatch)
    with pytest.raises(KernelsUnavailable, match=r"unknown option -std=c\+\+20"):
        build(tmp_path / "kernels", "plain")
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [".lock"]


def test_without_a_compiler_the_reason_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelsUnavailable, match=r"apt install g\+\+"):
        build(tmp_path, "plain")


def test_a_folder_that_cannot_be_written_is_a_reason(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelsUnavailable, match="cannot be written"):
        build(tmp_path / "file", "plain")


def test_this_processor_has_a_level() -> None:
    assert processor_level() in LEVELS
