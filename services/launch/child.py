"""One child process: started, watched, stopped, and never left behind.

Each child leads a process group of its own, so that Ctrl-C in a terminal reaches only `diptych up`
(which stops its children in order) and so that what a child itself started ends with it.
"""

import asyncio
import os
import signal
import subprocess
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from services.core.parent_death import dying_with_parent

POLL_SECONDS = 0.05
STOP_GRACE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class ChildSpec:
    name: str  # in messages: prefill-0, gateway
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)  # beside our own
    log: Path | None = None  # where stdout and stderr go; None: to ours


class Child:
    """At most one running process of `spec`; may be started again after it has ended.

    `is_ready` asks whether the process that runs now does its work.
    """

    def __init__(self, spec: ChildSpec, is_ready: Callable[[], Awaitable[bool]]) -> None:
        self.spec = spec
        self.name = spec.name
        self.is_ready = is_ready
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process. Call from the main thread: the child dies with the calling thread."""
        assert self._process is None, f"{self.name} runs already"
        command = dying_with_parent(list(self.spec.command), signal.SIGTERM)
        environment = {**os.environ, **self.spec.environment}
        if self.spec.log is None:
            self._process = _spawn(command, environment, None)
            return
        with self.spec.log.open("ab") as log:
            self._process = _spawn(command, environment, log.fileno())

    async def wait(self) -> int:
        """Wait for the end of the process and its group; the exit code, -N when signal N ended it."""
        assert self._process is not None, f"{self.name} does not run"
        code = await exit_code(self._process.pid)
        self._reap()
        return code

    async def stop(self, grace_s: float = STOP_GRACE_SECONDS) -> None:
        """SIGTERM, and SIGKILL to the whole group after `grace_s`, or at once when cancelled."""
        if self._process is None:
            return
        try:
            os.kill(self._process.pid, signal.SIGTERM)
            async with asyncio.timeout(grace_s):
                await self.wait()
        except TimeoutError:
            pass
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process and its group now. Idempotent."""
        if self._process is not None:
            self._kill_group()
            self._reap()

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the log file; empty when there is none."""
        if self.spec.log is None or not self.spec.log.exists():
            return ""
        with self.spec.log.open(errors="replace") as log:
            return "".join(deque(log, maxlen=lines)).rstrip()

    def _reap(self) -> None:
        """Collect the ended process. Until then its id cannot be given to another process, so the
        group's leftovers are killed first."""
        assert self._process is not None
        self._kill_group()
        self._process.wait()
        self._process = None

    def _kill_group(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


async def exit_code(pid: int) -> int:
    """Wait until our child `pid` has ended; its exit code, -N when signal N ended it.

    The process is not collected: its owner does that.
    """
    # Polled: a pidfd would wake us without polling, but many container sandboxes refuse it.
    while (code := _ended_with(pid)) is None:  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECONDS)
    return code


def _ended_with(pid: int) -> int | None:
    end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if end is None:
        return None
    return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status


def _spawn(command: list[str], environment: dict[str, str], output: int | None) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
    )
