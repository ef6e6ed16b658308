"""A child process of the gateway that answers each frame on its stdin with one on its stdout."""

import asyncio
import os
import signal
import sys

from services.core.parent_death import dying_with_parent
from services.gateway.text.frames import LENGTH_BYTES, framed

_READ_BYTES = 1 << 20  # the buffer of an answer that is being read
_INHERITED = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_ALL", "TZ")  # and no secret


class ChildProcess:
    """At most one process of `module` at a time. Use it in the main thread only: a child dies with the thread
    that started it."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        await self.end()
        command = dying_with_parent([sys.executable, "-m", self._module], signal.SIGKILL)
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, env=_environment(), limit=_READ_BYTES
        )

    def send(self, body: bytes) -> None:
        """Raises ConnectionError if the process has ended."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(framed(body))
        except RuntimeError as error:  # what uvloop says of a pipe that it has closed
            raise ConnectionResetError(f"the child process has ended: {error}") from error

    async def exchange(self, body: bytes) -> bytes:
        """Raises IncompleteReadError or ConnectionError if the process ends. Who is interrupted here must end
        it: an answer may be half read."""
        self.send(body)
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        await self._process.stdin.drain()
        length = int.from_bytes(await self._process.stdout.readexactly(LENGTH_BYTES), "little")
        return await self._process.stdout.readexactly(length)

    async def exit_code(self) -> int:
        """Of a process that is ending; -N when signal N ended it."""
        assert self._process is not None
        return await self._process.wait()

    async def end(self) -> None:
        """Kill it."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _INHERITED if name in os.environ}
