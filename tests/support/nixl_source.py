"""A process with memory that others may read over NIXL: block i is filled with byte i + 1.

    python -m tests.support.nixl_source BLOCKS BLOCK_BYTES

prints its RemotePool as JSON and lives until its stdin is closed.
"""

import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import msgspec

from services.transfer.nixl_agent import NixlAgent
from services.transfer.nixl_reader import RemotePool


class NixlSourceProcess:
    """The parent's side."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        command = [sys.executable, "-m", "tests.support.nixl_source", str(blocks), str(block_bytes)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.pool = msgspec.json.decode(self.process.stdout.readline(), type=RemotePool)

    def __enter__(self) -> "NixlSourceProcess":
        return self

    def stop(self) -> None:
        """SIGSTOP; returns when none of its threads runs any more."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        while any(_state(task) != "T" for task in tasks.iterdir()):
            time.sleep(0.001)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()


def _state(task: Path) -> str:
    """Of a thread; see proc(5)."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def shared_memory(size: int) -> memoryview:
    """Like a worker's KV pool."""
    fd = os.memfd_create("test-pool")
    os.ftruncate(fd, size)
    try:
        return memoryview(mmap.mmap(fd, size))
    finally:
        os.close(fd)


def main() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it (nohup)
    blocks, block_bytes = map(int, sys.argv[1:])
    memory = shared_memory(blocks * block_bytes)
    for block in range(blocks):
        memory[block * block_bytes : (block + 1) * block_bytes] = bytes([block % 255 + 1]) * block_bytes
    agent = NixlAgent("source", memory)
    pool = RemotePool(agent.metadata(), agent.address, agent.bytes)
    sys.stdout.buffer.write(msgspec.json.encode(pool) + b"\n")
    sys.stdout.flush()
    sys.stdin.read()
    agent.close()


if __name__ == "__main__":
    main()
