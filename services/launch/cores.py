"""How the cores of this machine are divided among the workers on it.

Workers that each take all cores disturb each other badly: on two cores, two workers with torch's
default of two threads each were 20 times slower than with one thread each.
"""

import os


def usable_cores() -> int:
    """The cores this process may run on (its affinity: containers and taskset shrink it)."""
    return len(os.sched_getaffinity(0))


def threads_per_worker(cores: int, workers: int) -> int:
    """An equal share for each worker, at least one thread."""
    return max(1, cores // workers)


def thread_environment(threads: int) -> dict[str, str]:
    """What a worker's OpenMP runtime reads when it is loaded. Waiting threads sleep instead of
    spinning, because the core they would spin on belongs to another process."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
