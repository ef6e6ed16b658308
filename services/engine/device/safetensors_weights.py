"""A model's tensors from a Hugging Face folder's safetensors files (one, or several shards)."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.core.errors import ModelFileError
from services.engine.device.tensor_source import check_shape, missing_tensor


class SafetensorsSource:
    """A TensorSource. The files stay mapped while it lives; a tensor is read when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._folder = paths[0].parent
        self._files = {path: _open(path) for path in paths}
        self._path_of: dict[str, Path] = {}
        for path, file in self._files.items():
            self._path_of.update(dict.fromkeys(file.keys(), path))  # type: ignore[no-untyped-call]

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        path = self._path_of.get(name)
        if path is None:
            raise missing_tensor(name, self._folder)
        tensor: Tensor = self._files[path].get_tensor(name)  # type: ignore[no-untyped-call]
        check_shape(name, path, tuple(tensor.shape), shape)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ModelFileError(
                f"{path}: tensor {name} is stored as {tensor.dtype}; float32, bfloat16 and float16 are "
                "supported. Get an unquantised version of the model, or a GGUF file."
            )
        return tensor

    def read_groups(self, name: str, shape: tuple[int, ...]) -> None:
        return None


def _open(path: Path) -> "safe_open":
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelFileError(f"{path} cannot be read ({error}). Get the model again.") from error
