"""The machine's cores are shared out, never promised twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.cpu.core_slots import SLOT_BYTES, CoreSlots
from services.launch.cores import CoreFile, thread_environment, threads_per_worker

positive = st.integers(1, 512)


@given(cores=positive, workers=positive)
def test_every_worker_has_a_thread_and_no_core_is_given_twice(cores: int, workers: int) -> None:
    threads = threads_per_worker(cores, workers)
    assert threads >= 1
    assert threads == 1 or threads * workers <= cores
    assert (threads + 1) * workers > cores  # and no more could be given


def test_there_is_a_slot_for_every_worker_and_no_other() -> None:
    file = CoreFile(3)
    assert file.path.read_bytes() == bytes(3 * SLOT_BYTES)
    assert [CoreSlots(file.path, slot).workers for slot in range(3)] == [3, 3, 3]
    with pytest.raises(ValueError, match="has 3 slots, none with the number 3"):
        CoreSlots(file.path, 3)
    file.close()
    assert not file.path.exists()


def test_waiting_threads_sleep() -> None:
    assert thread_environment(3) == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}
