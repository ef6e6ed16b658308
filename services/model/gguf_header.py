"""The header of a GGUF file: its metadata and where its tensors lie.

    magic "GGUF" | version | tensor count | metadata count
    metadata:  key, type, value ...             (the vocabulary and the merges are in here)
    tensors:   name, dimensions, type, offset from the start of the data ...
    padding to `general.alignment`, then the data

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.

`gguf.GGUFReader` reads the same, but makes numpy views of every string of the vocabulary: 1.7 s of
CPU and 130 MB for 49,152 tokens, against 0.03 s and 15 MB here. And to it a file that is cut short is
an array of the wrong shape.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from services.core.errors import ModelFileError

_VERSIONS = (2, 3)
_LENGTH = struct.Struct("<Q")
_PREAMBLE = struct.Struct("<4sIQQ")  # magic, version, tensor count, metadata count
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]  # as GGUF writes it: the fastest-changing dimension first
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    path: Path
    metadata: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)


def read_header(path: Path) -> GgufHeader:
    """Reads and checks a GGUF file's header. Raises ModelFileError if the file is not whole."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelFileError(
                    f"{path} is not a GGUF file. Give a .gguf file or a Hugging Face model folder."
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except OSError as error:
        raise ModelFileError(
            f"{path} cannot be read ({error}). Check the path and its permissions."
        ) from error
    except (struct.error, ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise _damaged(path, f"its header does not parse ({error})") from error


def _damaged(path: Path, problem: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is damaged or incomplete: {problem}. "
        "Delete it and download it again (`diptych model pull` for the default model)."
    )


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    _, version, tensor_count, metadata_count = _PREAMBLE.unpack_from(data)
    if version not in _VERSIONS:
        raise ModelFileError(
            f"{path} has GGUF version {version}; versions 2 and 3 in little-endian order are supported. "
            "Convert the model again with a current converter."
        )
    cursor = _Cursor(data, _PREAMBLE.size)
    metadata = {cursor.string(): cursor.value(cursor.value_type()) for _ in range(metadata_count)}
    relative = {cursor.string(): cursor.tensor() for _ in range(tensor_count)}
    alignment = int(metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))
    data_start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: TensorInfo(info.shape, info.type, data_start + info.offset, info.size)
        for name, info in relative.items()
    }
    promised = max((info.offset + info.size for info in tensors.values()), default=data_start)
    if promised > len(data):
        raise _damaged(path, f"it has {len(data):,} bytes where its header promises {promised:,}")
    return GgufHeader(path, metadata, tensors)


class _Cursor:
    """Reads the header's values one after the other. Past the end it raises struct.error."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self._data = data
        self.at = at  # bytes from the start of the file

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        values = struct.unpack_from(layout, self._data, self.at)
        self.at += struct.calcsize(layout)
        return values

    def strings(self, count: int) -> list[str]:
        data, at, values = self._data, self.at, []  # locals: this loop runs once per vocabulary entry
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size + length
            values.append(data[at - length : at].decode())
        self.at = at
        return values

    def string(self) -> str:
        return self.strings(1)[0]

    def value_type(self) -> GGUFValueType:
        return GGUFValueType(self.scalars("I", 1)[0])

    def value(self, value_type: GGUFValueType) -> Any:
        if value_type is GGUFValueType.STRING:
            return self.string()
        if value_type is GGUFValueType.ARRAY:
            return self._array()
        return self.scalars(_SCALARS[value_type], 1)[0]

    def _array(self) -> list[Any]:
        item_type = self.value_type()
        (count,) = self.scalars("Q", 1)
        if item_type is GGUFValueType.STRING:
            return self.strings(count)
        if item_type is GGUFValueType.ARRAY:
            return [self._array() for _ in range(count)]
        return list(self.scalars(_SCALARS[item_type], count))

    def tensor(self) -> TensorInfo:
        """A tensor's entry after its name; its offset is relative to the data's start."""
        (dimensions,) = self.scalars("I", 1)
        shape = self.scalars("Q", dimensions)
        kind, offset = GGMLQuantizationType(self.scalars("I", 1)[0]), self.scalars("Q", 1)[0]
        items_per_block, block_bytes = GGML_QUANT_SIZES[kind]
        return TensorInfo(shape, kind, offset, prod(shape) // items_per_block * block_bytes)
