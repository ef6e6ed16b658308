"""The team of threads and the shares of cores, checked in C++."""

import subprocess
from pathlib import Path

import pytest

from kernels.cpu.build import SOURCES, KernelsUnavailable, compiler

FLAGS = ("-std=c++20", "-O1", "-pthread")


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("team") / "team_check"
    source = Path(__file__).with_name("team_check.cpp")
    try:
        command = [compiler(), *FLAGS, "-I", str(SOURCES), str(source), "-o", str(built)]
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    subprocess.run(command, check=True, timeout=120)
    return built


def test_every_item_is_done_once_whoever_is_held_up_and_cores_are_shared_out_whole(checks: Path) -> None:
    done = subprocess.run([checks], capture_output=True, text=True, timeout=60)
    assert done.stdout == "ok\n"
