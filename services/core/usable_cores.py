"""How many cores this process may keep busy: a container's share is a quota, a taskset's an affinity."""

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """At least 1. Of a quota that is no whole number the whole part: a thread that it does not cover would
    make all of them stand still for a part of each period."""
    affinity = len(os.sched_getaffinity(0))
    try:
        membership = Path("/proc/self/cgroup").read_text()
    except OSError:
        return affinity
    quota = cpu_quota(membership, _CGROUPS)
    return affinity if quota is None else max(1, min(affinity, int(quota)))


def cpu_quota(membership: str, mount: Path) -> float | None:
    """Cores' worth of time that the tightest of a process's control groups allows; None: no limit.

    `membership` is the text of /proc/PID/cgroup, `mount` where the groups are. In a container the path is
    often that of the host, where nothing is: what its parents say counts, up to the mount itself.
    """
    quotas = (
        quota
        for folder, path in _hierarchies(membership)
        for group in _with_parents(mount / folder, path)
        if (quota := _quota_of(group)) is not None
    )
    return min(quotas, default=None)


def _hierarchies(membership: str) -> Iterator[tuple[str, str]]:
    """Folders below the mount that can limit a processor's time, and this process's path in each."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from (("", path), ("unified", path))
        elif "cpu" in controllers.split(","):
            yield from ((controllers, path), ("cpu", path))


def _with_parents(root: Path, path: str) -> Iterator[Path]:
    group = root / path.lstrip("/")
    yield group
    while group != root and root in group.parents:
        group = group.parent
        yield group


def _quota_of(group: Path) -> float | None:
    """Version 2 has both numbers in one file, version 1 in two."""
    try:
        if (both := group / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
