"""How the cores of this machine are divided among the workers on it.

Each worker has an equal share, always. While others are idle a worker with 8-bit weights computes on
theirs too (kernels/cpu/source/cores.h): that they are busy is written in a file that the cluster makes.
torch stays with the share: two workers with its default of two threads each, on two cores, were 20 times
slower than with one thread each.
"""

import os
from pathlib import Path

from kernels.cpu.core_slots import SLOT_BYTES


def threads_per_worker(cores: int, workers: int) -> int:
    """An equal share for each worker, at least one thread."""
    return max(1, cores // workers)


def describe_shares(cores: int, workers: int) -> str:
    """In words."""
    share = f"{threads_per_worker(cores, workers)} per worker ({cores} cores / {workers} workers)"
    if min(cores, workers) == 1:
        return share
    return f"{share}; with 8-bit weights up to {cores} while others are idle"


def thread_environment(threads: int) -> dict[str, str]:
    """What a worker's OpenMP runtime reads when it is loaded. Waiting threads sleep instead of
    spinning, because the core they would spin on belongs to another process."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


class CoreFile:
    """The file, with a slot for each worker; in memory, so that it ends with this process in any case."""

    def __init__(self, workers: int) -> None:
        self._file = os.fdopen(os.memfd_create("diptych-cores"), "r+b")
        self._file.truncate(SLOT_BYTES * workers)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")

    def close(self) -> None:
        self._file.close()
