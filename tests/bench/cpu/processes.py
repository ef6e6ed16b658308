"""Servers as child processes: started, waited for, weighed, and ended with all that they started."""

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from services.core.parent_death import dying_with_parent

ROOT = Path(__file__).resolve().parents[3]
STOP_TIMEOUT_S = 30.0
POLL_S = 0.2


class PeerFailed(Exception):
    """A contestant could not be installed, built or started. The message shows its last words."""


@contextmanager
def child(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process, whose output goes to `log`. In the end nothing is left of its family."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            dying_with_parent([*command], signal.SIGTERM),
            env=dict(environment),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    family = family_of(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def family_of(pid: int) -> list[psutil.Process]:
    """The process and all below it."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def await_ready(
    process: "subprocess.Popen[bytes]", is_ready: Callable[[], bool], timeout_s: float, log: Path
) -> None:
    """Raises PeerFailed if the process ends, or is not ready in time."""
    deadline = time.monotonic() + timeout_s
    while not is_ready():
        if process.poll() is not None:
            raise PeerFailed(f"ended with {process.returncode} while starting\n{last_words(log)}")
        if time.monotonic() > deadline:
            raise PeerFailed(f"not ready after {timeout_s:g} s\n{last_words(log)}")
        time.sleep(POLL_S)


def fetch(url: str) -> bytes | None:
    """The body of a good answer, else None."""
    with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=2.0) as answer:
        return bytes(answer.read())
    return None


def last_words(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def memory_mib(pids: Sequence[int]) -> float:
    """Proportional set size of the processes and all below them: a page that several share counts once.

    Unlike the resident size it does not count a KV pool twice that two processes map.
    """
    family = {process.pid for pid in pids for process in family_of(pid)}
    return sum(map(_pss_kib, family)) / 1024


def _pss_kib(pid: int) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def run_step(
    what: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> None:
    """One step of an installation, to its end. Raises PeerFailed."""
    print(f"  {what}: {' '.join(command)}", file=sys.stderr, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )
        except FileNotFoundError as error:
            raise PeerFailed(f"{what}: {error}") from error
    if ended.returncode:
        raise PeerFailed(f"{what} failed ({ended.returncode}), see {log}\n{last_words(log)}")
