"""The settings of section [cluster], read the same way by every command that speaks to workers."""

import argparse
import os
import secrets
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from services.core.config import add_flags, given_flags, load_config
from services.wire.cluster_lock import ClusterLock

_PREFIX = "cluster_"


def add_lock_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, ClusterLock, _PREFIX)


def load_lock(arguments: argparse.Namespace) -> ClusterLock:
    """Raises ConfigError."""
    flags = given_flags(ClusterLock, arguments, _PREFIX)
    file: Path | None = getattr(arguments, "config", None)  # some commands have no file
    return load_config(ClusterLock, "cluster", file=file, environ=os.environ, flags=flags, prefix=_PREFIX)


def lock_of_its_own(given: ClusterLock) -> ClusterLock:
    """For a cluster on one machine, whose other users could reach its ports too: at least a random token."""
    return given if given.is_locked or given.insecure else ClusterLock(token=secrets.token_hex(32))


def lock_to_state(lock: ClusterLock) -> dict[str, str]:
    """What is set, as another process can use it, wherever it runs."""
    values = {field.name: getattr(lock, field.name) for field in fields(lock) if field.name != "insecure"}
    return {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in values.items()
        if value
    }


def lock_from_state(known: Mapping[str, str]) -> ClusterLock:
    return load_config(ClusterLock, "cluster", environ={}, flags=known)
