"""TensorSource: one model's tensors by their Hugging Face names, whatever the file format."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from kernels.cpu.packed_weight import Groups
from services.core.errors import ModelFileError


class TensorSource(Protocol):
    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, on the CPU, in the file's precision or float32.

        Raises ModelFileError, naming the tensor and the file, if it is missing or has another shape.
        """
        ...

    def read_groups(self, name: str, shape: tuple[int, ...]) -> Groups | None:
        """One matrix as the file has it in groups of integers; None if that is not how the file has it.

        Raises ModelFileError as `read` does.
        """
        ...


def missing_tensor(name: str, path: Path) -> ModelFileError:
    return ModelFileError(
        f"{path} has no tensor {name}, which its configuration asks for. Get the model again, or another one."
    )


def check_shape(name: str, path: Path, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ModelFileError(
            f"{path}: tensor {name} has shape {list(found)}, but its configuration asks for "
            f"{list(expected)}. Get the model again, or another one."
        )
