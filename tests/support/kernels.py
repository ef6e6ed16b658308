"""The C++ kernels that this machine has built, for processes with a DIPTYCH_HOME of their own."""

from functools import cache
from pathlib import Path
from typing import Any

from services.model.home import diptych_home
from services.worker.config import WorkerConfig
from services.worker.quantization import choose_quantization


def share_kernels(home: Path) -> None:
    """`home` uses this machine's folder of them instead of building them again."""
    folder = diptych_home() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    (home / "kernels").symlink_to(folder, target_is_directory=True)


@cache
def scores() -> dict[str, Any]:
    """What a completion asks for in order to compare logprobs to the last bit.

    With 8-bit weights they depend on a token's context alone. Where this machine cannot have those (it has no
    compiler) they also depend on what else is in a step, so only tokens can be compared.
    """
    quantised = choose_quantization(WorkerConfig(), lambda: None).name == "int8"
    return {"logprobs": 2} if quantised else {}
