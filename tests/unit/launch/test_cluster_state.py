"""The state file leads to the running cluster, and only to a running one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.launch.cluster_state import ClusterState, read_state, remove_state, write_state

STATE = ClusterState("http://127.0.0.1:1", "redis://:secret@127.0.0.1:2/0", os.getpid())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    return tmp_path


def test_what_was_written_is_read_until_it_is_removed() -> None:
    assert read_state() is None
    write_state(STATE)
    assert read_state() == STATE
    remove_state(STATE)
    assert read_state() is None


def test_the_state_of_a_dead_cluster_is_not_used() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    write_state(ClusterState("http://127.0.0.1:1", "redis://127.0.0.1:2/0", process.pid))
    assert read_state() is None


def test_a_cluster_does_not_remove_the_state_of_a_later_one() -> None:
    later = ClusterState("http://127.0.0.1:9", "redis://127.0.0.1:2/0", os.getpid())
    write_state(STATE)
    write_state(later)
    remove_state(STATE)
    assert read_state() == later


def test_a_broken_file_counts_as_none(home: Path) -> None:
    write_state(STATE)
    (home / "run" / "cluster.json").write_text('{"gateway_url": 3')
    assert read_state() is None


def test_only_its_owner_can_read_it(home: Path) -> None:
    write_state(STATE)
    assert (home / "run" / "cluster.json").stat().st_mode & 0o077 == 0
