"""What tests of this package share."""

from collections.abc import Callable

import msgspec
import pytest

from router.step_model import StepModel
from services.core.block_hash import Compatibility
from services.core.worker_report import WorkerReport


@pytest.fixture
def report() -> Callable[..., WorkerReport]:
    """Makes a worker's report: report("a", epoch=1, running=2)."""
    typical = WorkerReport(
        worker_id="",
        epoch=2**64 - 1,
        role="both",
        state="ready",
        address="127.0.0.1:1",
        served_model="smol",
        compatibility=Compatibility(model="smol", revision="r", layout="block-major"),
        context_tokens_max=2048,
        model=StepModel(step=2.5, token=1.25),
    )
    return lambda worker_id, **changes: msgspec.structs.replace(typical, worker_id=worker_id, **changes)
