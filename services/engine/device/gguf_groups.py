"""The quantised types of GGUF whose numbers the kernels use as they are: blocks of bytes -> Groups.

Each type's bytes, little-endian, as ggml's `ggml-common.h` lays them out:

    Q8_0   32 weights: scale (float16), 32 signed bytes
    Q4_0   32 weights: scale, 16 bytes: the low halves are the first 16 weights, the high ones the others
    Q4_1   as Q4_0 with a minimum (float16) behind the scale
    Q4_K   256 weights: scale, negative minimum, 12 bytes with 8 multiples (6 bits) of each, 128 bytes
"""

from collections.abc import Callable

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import Q4_K
from numpy.typing import NDArray

from kernels.cpu.packed_weight import GROUP, Groups

_Bytes = NDArray[np.uint8]  # [blocks, bytes of one]


def read_groups(kind: GGMLQuantizationType, blocks: NDArray[np.uint8], outputs: int) -> Groups | None:
    """blocks: uint8 [all blocks of a weight, bytes of one]; None if the kernels have no form for the type."""
    reader = _READERS.get(kind)
    if reader is None:
        return None
    parts = [torch.from_numpy(np.ascontiguousarray(part)).view(outputs, -1) for part in reader(blocks)]
    return Groups(parts[0].shape[1], *parts)


def _q8_0(blocks: _Bytes) -> tuple[NDArray[np.generic], ...]:
    return blocks[:, 2:].view(np.int8), _float16(blocks[:, :2])


def _q4_0(blocks: _Bytes) -> tuple[NDArray[np.generic], ...]:
    scales = _float16(blocks[:, :2])
    return _halves(blocks[:, 2:], 16), scales, scales * np.float16(-8)


def _q4_1(blocks: _Bytes) -> tuple[NDArray[np.generic], ...]:
    return _halves(blocks[:, 4:], 16), _float16(blocks[:, :2]), _float16(blocks[:, 2:4])


def _q4_k(blocks: _Bytes) -> tuple[NDArray[np.generic], ...]:
    """Its scales have 17 significant bits, of which float16 keeps 11: a weight moves by 1/100 of a step."""
    scale, minimum = (_float16(blocks[:, at : at + 2]).astype(np.float32) for at in (0, 2))
    scales, minimums = Q4_K.get_scale_min(blocks[:, 4:16])
    values = _halves(blocks[:, 16:], GROUP)
    return values, (scale * scales).astype(np.float16), (-minimum * minimums).astype(np.float16)


def _float16(pairs: _Bytes) -> NDArray[np.float16]:
    return np.ascontiguousarray(pairs).view("<f2")


def _halves(pairs: _Bytes, size: int) -> _Bytes:
    """Of each `size` bytes first the low halves, then the high ones."""
    runs = pairs.reshape(len(pairs), -1, 1, size)
    return np.concatenate((runs & 15, runs >> 4), axis=2).reshape(len(pairs), -1)


_READERS: dict[GGMLQuantizationType, Callable[[_Bytes], tuple[NDArray[np.generic], ...]]] = {
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q4_K: _q4_k,
}
