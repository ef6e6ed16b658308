"""A container's quota of processor time bounds the cores that are used, as its affinity does."""

from pathlib import Path

import pytest

from services.core.usable_cores import cpu_quota, usable_cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def limit(group: Path, quota: int, period: int = 100_000) -> None:
    """As version 1 has it."""
    write(group / "cpu.cfs_quota_us", str(quota))
    write(group / "cpu.cfs_period_us", str(period))


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    membership = "0::/kubepods/pod1/container\n"
    write(tmp_path / "kubepods/cpu.max", "max 100000")
    write(tmp_path / "kubepods/pod1/cpu.max", "250000 100000")
    write(tmp_path / "kubepods/pod1/container/cpu.max", "300000 100000")
    assert cpu_quota(membership, tmp_path) == 2.5
    assert cpu_quota("0::/\n", tmp_path) is None


def test_a_containers_own_group_is_found_at_the_mount_where_its_path_is_the_hosts(tmp_path: Path) -> None:
    write(tmp_path / "cpu.max", "50000 100000")
    assert cpu_quota("0::/../../system.slice/docker-1.scope\n", tmp_path) == 0.5
    assert cpu_quota("0::/system.slice/docker-1.scope\n", tmp_path) == 0.5


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_version_1_is_read_wherever_it_is_mounted(tmp_path: Path, folder: str) -> None:
    membership = "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n0::/\n"
    limit(tmp_path / folder, 300_000)
    assert cpu_quota(membership, tmp_path) == 3.0
    limit(tmp_path / folder, -1)
    assert cpu_quota(membership, tmp_path) is None
    limit(tmp_path / folder / "docker/1", 150_000)
    assert cpu_quota(membership, tmp_path) == 1.5


@pytest.mark.parametrize("text", ["", "much", "max", "1 2 3"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, text: str) -> None:
    write(tmp_path / "cpu.max", text)
    assert cpu_quota("0::/\n", tmp_path) is None


def test_this_process_has_a_core() -> None:
    assert usable_cores() >= 1
