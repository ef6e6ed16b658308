"""The machine's cores are shared out, never promised twice."""

from hypothesis import given
from hypothesis import strategies as st

from services.launch.cores import thread_environment, threads_per_worker, usable_cores

positive = st.integers(1, 512)


@given(cores=positive, workers=positive)
def test_every_worker_has_a_thread_and_no_core_is_given_twice(cores: int, workers: int) -> None:
    threads = threads_per_worker(cores, workers)
    assert threads >= 1
    assert threads == 1 or threads * workers <= cores
    assert (threads + 1) * workers > cores  # and no more could be given


def test_the_cores_are_those_this_process_may_use() -> None:
    assert usable_cores() >= 1


def test_waiting_threads_sleep() -> None:
    assert thread_environment(3) == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}
