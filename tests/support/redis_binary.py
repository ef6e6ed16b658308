"""A real redis-server, version 7 or later: from PATH, or from Debian's packages without installing them.

The packages are unpacked into the cache folder, for which nobody needs to be root. `python -m
tests.support.redis_binary` prints the path.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.model.home import diptych_home

VERSION_LEAST = 7
# redis-server's executable is in redis-tools; the others are what it needs beside a usual system.
PACKAGES = ["redis-server", "redis-tools", "libjemalloc2", "liblzf1", "libatomic1"]
COMMAND_TIMEOUT_S = 60.0


class NoRedis(Exception):
    """Why there is no redis-server."""


def redis_server() -> Path:
    """The executable. Raises NoRedis."""
    installed = shutil.which("redis-server")
    if installed and _version(Path(installed)) >= VERSION_LEAST:
        return Path(installed)
    unpacked = diptych_home() / "redis-server" / "run"
    if not unpacked.exists():
        _fetch(unpacked.parent)
    return unpacked


def _version(binary: Path) -> int:
    printed = _run([str(binary), "--version"])
    found = re.search(r"v=(\d+)\.", printed)
    return int(found[1]) if found else 0


def _fetch(folder: Path) -> None:
    """Make `folder`, with an executable `run` in it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _new_folder(folder) as new, tempfile.TemporaryDirectory() as downloads:
        for package in _downloaded(Path(downloads) / "packages"):
            _run(["dpkg-deb", "-x", str(package), str(new)])
        libraries = ":".join(f"$here/{path.relative_to(new)}" for path in (new / "usr/lib").glob("*-linux-*"))
        launcher = new / "run"
        launcher.write_text(
            '#!/bin/sh\nhere=$(dirname "$0")\n'
            f'LD_LIBRARY_PATH="{libraries}:$LD_LIBRARY_PATH" exec "$here/usr/bin/redis-server" "$@"\n'
        )
        launcher.chmod(0o755)
        if _version(launcher) < VERSION_LEAST:
            raise NoRedis(f"Debian's redis-server is older than version {VERSION_LEAST}")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that becomes `folder` at the end, unless somebody else was faster."""
    new = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        yield new
        if not folder.exists():
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _downloaded(folder: Path) -> list[Path]:
    folder.mkdir()
    try:
        _run(["apt-get", "download", *PACKAGES], folder)
    except NoRedis:  # a machine that has never looked at its package lists: look at them without being root
        lists = folder.parent / "lists"
        (lists / "partial").mkdir(parents=True)
        options = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={folder.parent / 'cache'}"]
        (folder.parent / "cache/archives/partial").mkdir(parents=True)
        _run(["apt-get", *options, "update"], folder)
        _run(["apt-get", *options, "download", *PACKAGES], folder)
    return list(folder.glob("*.deb"))


def _run(command: list[str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, timeout=COMMAND_TIMEOUT_S, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        raise NoRedis(f"{' '.join(command[:2])} failed: {output.strip()[-300:]}") from error
    return done.stdout


if __name__ == "__main__":
    try:
        print(redis_server())
    except NoRedis as error:
        sys.exit(f"no redis-server {VERSION_LEAST}: {error}")
