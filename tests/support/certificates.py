"""Certificates of clusters for tests, made as `diptych certs` makes them."""

from pathlib import Path

from services.launch.authority import Authority
from services.wire.cluster_lock import ClusterLock


def node(authority: Authority, name: str, days: float = 30.0) -> ClusterLock:
    """The lock of one more node, whose certificate is valid for so long."""
    return lock_of(authority.issue(name, ["127.0.0.1"], days))


def lock_of(folder: Path) -> ClusterLock:
    return ClusterLock(cert=folder / "tls.crt", key=folder / "tls.key", ca=folder / "ca.crt")
