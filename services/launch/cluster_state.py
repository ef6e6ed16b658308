"""What `diptych up` leaves for other commands to find the running cluster by: run/cluster.json."""

import os
from pathlib import Path

import msgspec

from services.model.home import diptych_home


class ClusterState(msgspec.Struct, frozen=True):
    gateway_url: str  # http://host:port or https://..., without /v1
    redis_url: str
    pid: int  # of `diptych up`
    lock: dict[str, str] = {}  # settings of section [cluster] that reach its workers
    gateway_cert: str = ""  # path, if it speaks https


def write_state(state: ClusterState) -> None:
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.unlink(missing_ok=True)
    with open(fresh, "xb", opener=_for_its_owner) as file:
        file.write(msgspec.json.encode(state))
    os.replace(fresh, path)


def read_state() -> ClusterState | None:
    """The cluster that was started last, if its `diptych up` still runs."""
    try:
        state = msgspec.json.decode(_path().read_bytes(), type=ClusterState)
        os.kill(state.pid, 0)
    except (OSError, msgspec.DecodeError):
        return None
    return state


def remove_state(state: ClusterState) -> None:
    """Remove what write_state wrote, unless a later cluster has replaced it."""
    if read_state() == state:
        _path().unlink(missing_ok=True)


def _for_its_owner(path: str, flags: int) -> int:
    """The Redis URL has a password, and the lock may be a token."""
    return os.open(path, flags, 0o600)


def _path() -> Path:
    return diptych_home() / "run" / "cluster.json"
