"""Messages of a megabyte come and go without page faults, unless the user wants it otherwise."""

import subprocess
import sys

FAULTS = """
import resource
from services.core.malloc import keep_freed_memory
keep_freed_memory()
def churn():
    kept = [bytes(1 << 20) for _ in range(2)]  # as in a stream: the last message and the next
    for _ in range(100):
        kept = [kept[1], b"x" * (1 << 20)]
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(environment: dict[str, str]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_freed_memory_is_used_again() -> None:
    assert page_faults({}) < 1_000  # of 25,600 pages


def test_the_environment_of_the_user_wins() -> None:
    assert page_faults({"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}) > 20_000
