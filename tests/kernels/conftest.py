"""Seeds the random inputs of these tests, and builds the C++ kernels once per machine."""

import pytest
import torch

from kernels.cpu.build import LEVELS, KernelsUnavailable, processor_features, processor_level
from kernels.cpu.kernels import CpuKernels
from services.model.home import diptych_home


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def _kernels(threads: int, level: str) -> CpuKernels:
    try:
        return CpuKernels(diptych_home() / "kernels", threads, level)
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kernels() -> CpuKernels:
    return _kernels(1, processor_level())


@pytest.fixture(scope="session")
def two_threads() -> CpuKernels:
    return _kernels(2, processor_level())


@pytest.fixture(scope="session")
def plain() -> CpuKernels:
    return _kernels(1, "plain")


@pytest.fixture(scope="session", params=LEVELS)
def every_kernels(request: pytest.FixtureRequest) -> CpuKernels:
    """Each level that this processor can run."""
    if not LEVELS[request.param][0] <= processor_features():
        pytest.skip(f"this processor has no {request.param}")
    return _kernels(1, request.param)
