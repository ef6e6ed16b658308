"""A model's tensors from a GGUF file one by one, dequantised to float32 or in the file's own groups."""

import re
from functools import partial
from math import gcd
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.packed_weight import Groups
from services.core.errors import ModelFileError
from services.engine.device.gguf_groups import read_groups
from services.engine.device.tensor_source import check_shape, missing_tensor
from services.model.gguf_header import TensorInfo, read_header

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
# gguf.quants loops in Python over groups of 16 rows. Rows of this many values make groups of 1 MiB, which
# stay in the cache: 0.04 s for an embedding of 49,152 rows of 576 values, against 0.38 s row by row.
_VALUES_PER_ROW = 16384


class GgufSource:
    """A TensorSource. The file stays mapped while it lives; a tensor is read when it is asked for."""

    def __init__(self, path: Path, head_dim: int) -> None:
        header = read_header(path)
        self._path = path
        self._head_dim = head_dim
        self._tensors = header.tensors
        # Only for this architecture does the converter store q and k in the order of interleaved RoPE.
        self._interleaved = header.metadata["general.architecture"] == "llama"
        self._data = np.memmap(path, dtype=np.uint8, mode="r")

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored, info = self._find(name, shape)
        return self._ordered(name, torch.from_numpy(self._dequantized(stored, info)).view(shape))

    def read_groups(self, name: str, shape: tuple[int, ...]) -> Groups | None:
        _, info = self._find(name, shape)
        blocks = self._bytes(info).reshape(-1, GGML_QUANT_SIZES[info.type][1])
        groups = read_groups(info.type, blocks, shape[0])
        return groups and groups.rearranged(partial(self._ordered, name))

    def _find(self, name: str, shape: tuple[int, ...]) -> tuple[str, TensorInfo]:
        stored = gguf_name(name)
        info = self._tensors.get(stored)
        if info is None:
            raise missing_tensor(stored, self._path)
        check_shape(stored, self._path, tuple(reversed(info.shape)), shape)
        return stored, info

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        """The rows of a tensor, or what belongs to them, in the order of half rotation."""
        if self._interleaved and name.rpartition(".")[0].endswith(_ROTATED):
            return half_rotation_rows(rows, self._head_dim)
        return rows

    def _bytes(self, info: TensorInfo) -> NDArray[np.uint8]:
        return self._data[info.offset : info.offset + info.size]

    def _dequantized(self, stored: str, info: TensorInfo) -> NDArray[np.float32]:
        block_values, block_bytes = GGML_QUANT_SIZES[info.type]
        blocks_per_row = gcd(info.size // block_bytes, max(1, _VALUES_PER_ROW // block_values))
        try:
            values: NDArray[np.float32] = dequantize(
                self._bytes(info).reshape(-1, blocks_per_row * block_bytes), info.type
            )
        except NotImplementedError as error:
            raise ModelFileError(
                f"{self._path}: tensor {stored} is quantised as {info.type.name}, which is not supported. "
                "Get the model in another quantisation, such as Q8_0 or Q4_K_M."
            ) from error
        return values if values.flags.writeable else values.copy()  # float32 comes as a view of the file


def gguf_name(name: str) -> str:
    """'model.layers.3.self_attn.q_proj.weight' -> 'blk.3.attn_q.weight'."""
    module, _, kind = name.rpartition(".")
    layer = _LAYER.fullmatch(module)
    if layer:
        return f"blk.{layer[1]}.{_GGUF_NAMES[layer[2]]}.{kind}"
    return f"{_GGUF_NAMES[module]}.{kind}"


def half_rotation_rows(tensor: Tensor, head_dim: int) -> Tensor:
    """From rows x0 y0 x1 y1 ... of each head (interleaved RoPE) to x0 x1 ... y0 y1 ... (half rotation)."""
    return tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
