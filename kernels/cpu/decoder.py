"""A Llama-shaped model whose step is one call of the C++ kernels.

Weights have 4 or 8 bits and a scale for each output and group of inputs, activations 8 bits and a scale for
each token and group; or both are float32 (`packed_weight.py`).
"""

from collections.abc import Sequence
from ctypes import byref, c_void_p
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.cpu.kernels import CpuKernels, pool_struct, sequences_of
from kernels.cpu.library import BatchStruct, LayerStruct, ModelStruct
from kernels.cpu.packed_weight import PackedWeight
from kernels.reference.attention_plan import AttentionRow


class CpuLayer(Protocol):
    """What is not packed is contiguous float32."""

    @property
    def attention_norm(self) -> Tensor: ...  # [hidden]
    @property
    def qkv(self) -> PackedWeight: ...  # q, then k, then v
    @property
    def qkv_bias(self) -> Tensor | None: ...
    @property
    def qk_norm(self) -> Tensor | None: ...  # [heads + kv_heads, head_dim]
    @property
    def attention_output(self) -> PackedWeight: ...
    @property
    def mlp_norm(self) -> Tensor: ...  # [hidden]
    @property
    def gate_up(self) -> PackedWeight: ...  # from `pack_gate_up`
    @property
    def down(self) -> PackedWeight: ...


@dataclass(frozen=True, slots=True)
class CpuModel:
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    window: int | None  # tokens that a query sees, itself included
    rms_norm_eps: float
    frequencies: Tensor  # float32 [head_dim / 2], radians per position
    embedding: PackedWeight  # [vocab, hidden]; may be the unembedding
    layers: Sequence[CpuLayer]
    final_norm: Tensor
    unembedding: PackedWeight


class CpuDecoder:
    def __init__(self, kernels: CpuKernels, model: CpuModel, pool: Tensor) -> None:
        """pool: as `CpuKernels.paged_attention` takes it, finite."""
        assert model.heads % model.kv_heads == 0, "each kv head serves the same number of heads"
        assert model.head_dim % 2 == 0, "a head rotates in two halves"
        self._kernels = kernels
        self._kept = (model, pool)  # C++ has pointers into them
        self._vocab = model.unembedding.outputs
        self._kept_tokens = 0  # of the last batch, if it kept them all
        self._decoder = kernels.library.diptych_decoder_create(
            byref(_model_struct(model, pool)), kernels.team
        )

    def __del__(self) -> None:
        if decoder := self.__dict__.pop("_decoder", None):
            self._kernels.library.diptych_decoder_destroy(decoder)

    def logits(
        self,
        tokens: Sequence[int],
        rows: Sequence[AttentionRow],
        sampled: Sequence[int],
        keep_all: bool = False,
    ) -> Tensor:
        """Writes the batch's KV into the pool; float32 [sampled rows, vocab].

        tokens: those of all rows, one row after the other; sampled: the rows whose last token's logits count,
        ascending; keep_all: whether `logits_at` shall follow.
        """
        assert len(tokens) == sum(row.queries for row in rows), "the rows own the tokens"
        ids = np.array(tokens, dtype=np.int32)
        assert ((ids >= 0) & (ids < self._vocab)).all(), "token ids are in the vocabulary"
        assert all(one < other for one, other in pairwise(sampled)), "the sampled rows are in order"
        sequences, tables = sequences_of(rows)
        last = np.ascontiguousarray((sequences["first"] + sequences["queries"] - 1)[list(sampled)])
        logits = torch.empty((len(last), self._vocab))
        batch = BatchStruct(
            len(ids),
            len(rows),
            len(last),
            ids.ctypes.data,
            sequences.ctypes.data,
            last.ctypes.data,
            logits.data_ptr(),
            keep_all,
        )
        self._kernels.library.diptych_decoder_run(self._decoder, byref(batch))
        self._kept_tokens = len(ids) if keep_all else 0
        del tables
        return logits

    def logits_at(self, tokens: Sequence[int]) -> Tensor:
        """After any of the tokens of the last `logits`, which kept them: float32 [tokens, vocab]."""
        places = np.array(tokens, dtype=np.int32)
        assert ((places >= 0) & (places < self._kept_tokens)).all(), "the last batch kept them"
        assert len(places) <= self._kept_tokens, "there is room for as many rows as the batch had"
        logits = torch.empty((len(places), self._vocab))
        self._kernels.library.diptych_decoder_unembed(
            self._decoder, places.ctypes.data, len(places), logits.data_ptr()
        )
        return logits


def _model_struct(model: CpuModel, pool: Tensor) -> ModelStruct:
    layers = (LayerStruct * len(model.layers))(*(_layer_struct(layer) for layer in model.layers))
    return ModelStruct(
        layers=len(layers),
        hidden=model.embedding.inputs,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate=model.intermediate,
        vocab=model.embedding.outputs,
        window=model.window or 0,
        rms_norm_eps=model.rms_norm_eps,
        frequencies=_address(model.frequencies),
        embedding=model.embedding.struct,
        layer=layers,
        final_norm=_address(model.final_norm),
        unembedding=model.unembedding.struct,
        pool=pool_struct(pool, model.head_dim),
    )


def _layer_struct(layer: CpuLayer) -> LayerStruct:
    return LayerStruct(
        attention_norm=_address(layer.attention_norm),
        qkv=layer.qkv.struct,
        qkv_bias=_address(layer.qkv_bias),
        qk_norm=_address(layer.qk_norm),
        attention_output=layer.attention_output.struct,
        mlp_norm=_address(layer.mlp_norm),
        gate_up=layer.gate_up.struct,
        down=layer.down.struct,
    )


def _address(tensor: Tensor | None) -> c_void_p | None:
    if tensor is None:
        return None
    assert tensor.dtype == torch.float32, "C++ reads float32"
    assert tensor.is_contiguous(), "C++ reads rows one after the other"
    return c_void_p(tensor.data_ptr())
