"""How much of the machine is ours: fixed work, timed before each contestant, on all cores at once."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import msgspec
import numpy as np

ROUNDS = 20
HASHED = bytes(8 << 20)
COPIED_BYTES = 64 << 20


class Noise(msgspec.Struct, frozen=True):
    """Compare them between contestants: the work is the same each time. `worst` is of the slowest round."""

    hash_mb_per_s: float  # SHA-256, all cores together
    hash_worst: float
    copy_gb_per_s: float  # memory to memory, one core; read and written bytes

    def __str__(self) -> str:
        return (
            f"SHA-256 on all cores {self.hash_mb_per_s:,.0f} MB/s (slowest round {self.hash_worst:,.0f}), "
            f"copying {self.copy_gb_per_s:.1f} GB/s"
        )


def measure_noise() -> Noise:
    """Takes about a second."""
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as threads:
        rates = [_hash_rate(threads, cores) for _ in range(ROUNDS)]
    source = np.ones(COPIED_BYTES, np.uint8)
    target = np.zeros_like(source)
    return Noise(median(rates), min(rates), median(_copy_rate(source, target) for _ in range(ROUNDS)))


def _hash_rate(threads: ThreadPoolExecutor, cores: int) -> float:
    begun = time.perf_counter()
    # hashlib lets the interpreter go, so the threads run at once.
    list(threads.map(lambda _: hashlib.sha256(HASHED).digest(), range(cores)))
    return cores * len(HASHED) / 1e6 / (time.perf_counter() - begun)


def _copy_rate(source: np.ndarray, target: np.ndarray) -> float:
    begun = time.perf_counter()
    np.copyto(target, source)
    return 2 * source.nbytes / 1e9 / (time.perf_counter() - begun)
