"""The C++ kernels, called with tensors. Shapes are checked here; C++ trusts its caller.

Weights have 4 or 8 bits and a scale for each output and group of inputs, activations 8 bits and a scale for
each token and group; or both are float32. What a token gives depends on that token's numbers and context
alone, to the last bit: not on the batch, the threads, or how a prompt was cut into chunks (`source/linear.h`,
`source/attention.h`).

A call computes in a team of threads, and lets other Python threads run meanwhile.
"""

from collections.abc import Sequence
from ctypes import byref, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.build import processor_level
from kernels.cpu.core_slots import CoreSlots
from kernels.cpu.library import (
    SEQUENCE,
    BatchStruct,
    LayerStruct,
    ModelStruct,
    PoolStruct,
    load_library,
)
from kernels.cpu.packed_weight import PackedWeight
from kernels.reference.attention_plan import AttentionRow


class Int8Layer(Protocol):
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
class Int8Model:
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    window: int | None  # tokens that a query sees, itself included
    rms_norm_eps: float
    frequencies: Tensor  # float32 [head_dim / 2], radians per position
    embedding: PackedWeight  # [vocab, hidden]; may be the unembedding
    layers: Sequence[Int8Layer]
    final_norm: Tensor
    unembedding: PackedWeight


class Int8Kernels:
    """The kernels of one library, with a team of threads."""

    def __init__(
        self, folder: Path, threads: int, level: str | None = None, slots: CoreSlots | None = None
    ) -> None:
        """Builds the library in `folder` if it is not there, which takes seconds.

        `level` is one of kernels.cpu.build.LEVELS (None: the processor's best). With `slots`, `threads` are
        the cores that all workers share, and at each moment as many compute as the others leave.
        Raises KernelsUnavailable.
        """
        self.library = load_library(folder, level or processor_level())
        self._slots = slots  # the team reads and writes them
        place = (slots.address, slots.workers, slots.slot) if slots else (None, 0, 0)
        self.team = self.library.diptych_team_create(threads, *place)

    def __del__(self) -> None:
        if team := self.__dict__.pop("team", None):
            self.library.diptych_team_destroy(team)

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """float32 [tokens, inputs] -> [tokens, outputs]."""
        assert (x.dtype, x.shape[1]) == (torch.float32, weight.inputs), "activations fit the weight"
        x = x.contiguous()
        y = torch.empty((len(x), weight.outputs))
        self.library.diptych_linear(self.team, byref(weight.struct), x.data_ptr(), len(x), y.data_ptr())
        return y

    def kv_write(
        self, pool: Tensor, layer: int, k: Tensor, v: Tensor, blocks: Sequence[int], offsets: Sequence[int]
    ) -> None:
        """float32 k and v [tokens, kv_heads, dim] to these places of a pool as `paged_attention` takes it."""
        k, v = k.clone(memory_format=torch.contiguous_format), v.clone(memory_format=torch.contiguous_format)
        places = np.array([blocks, offsets], dtype=np.int32)
        self.library.diptych_kv_write(
            byref(_pool_struct(pool, k.shape[2])),
            layer,
            places[0].ctypes.data,
            places[1].ctypes.data,
            len(k),
            k.data_ptr(),
            v.data_ptr(),
        )

    def paged_attention(
        self, q: Tensor, pool: Tensor, layer: int, rows: Sequence[AttentionRow], window: int | None
    ) -> Tensor:
        """float32 [tokens, heads, dim] -> [tokens, heads * dim]; `rows` own the tokens one after the other.

        pool: contiguous [blocks, layers, 2, kv_heads, block_size, dim] of float32, finite, or of int8 with
        rows of [block_size, width + 4] bytes as source/pool.h lays them out; with the tokens' own k and v.
        """
        q = q.contiguous()
        out = torch.empty((len(q), q.shape[1] * q.shape[2]))
        sequences, tables = _sequences(rows)
        self.library.diptych_attention(
            self.team,
            byref(_pool_struct(pool, q.shape[2])),
            layer,
            q.shape[1],
            window or 0,
            sequences.ctypes.data,
            len(sequences),
            q.data_ptr(),
            out.data_ptr(),
        )
        del tables
        return out

    def sample(self, logits: Tensor, draws: NDArray[np.void]) -> list[int]:
        """One token for each row of float32 [rows, vocab].

        draws: rows of `library.DRAW`: seed, choice, index (of the output's token), top_p (1: off), min_p
        (0: off), temperature (0: the most probable token) and top_k (0: off).
        """
        logits = logits.contiguous()
        tokens = np.empty(len(draws), dtype=np.int64)
        self.library.diptych_sample(
            self.team,
            logits.data_ptr(),
            len(draws),
            logits.shape[1],
            draws.ctypes.data,
            tokens.ctypes.data,
        )
        chosen: list[int] = tokens.tolist()
        return chosen

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """float32 [rows, n] with `weight` [n]."""
        x, y = x.contiguous(), torch.empty(x.shape)
        self.library.diptych_rms_norm(x.data_ptr(), weight.data_ptr(), len(x), x.shape[1], eps, y.data_ptr())
        return y

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """float32 [rows, 16] each."""
        both, y = torch.cat((gate, up), dim=1), torch.empty(gate.shape)
        self.library.diptych_swiglu(both.data_ptr(), len(both), y.data_ptr())
        return y


class Int8Decoder:
    """A Llama-shaped model whose step is one call."""

    def __init__(self, kernels: Int8Kernels, model: Int8Model, pool: Tensor) -> None:
        """pool: as `Int8Kernels.paged_attention` takes it, finite."""
        assert model.heads % model.kv_heads == 0, "each kv head serves the same number of heads"
        assert model.head_dim % 2 == 0, "a head rotates in two halves"
        self._kernels = kernels
        self._kept = (model, pool)  # C++ has pointers into them
        self._vocab = model.unembedding.outputs
        self._tokens = 0  # of the last batch
        self._decoder = kernels.library.diptych_decoder_create(
            byref(_model_struct(model, pool)), kernels.team
        )

    def __del__(self) -> None:
        if decoder := self.__dict__.pop("_decoder", None):
            self._kernels.library.diptych_decoder_destroy(decoder)

    def logits(self, tokens: Sequence[int], rows: Sequence[AttentionRow], sampled: Sequence[int]) -> Tensor:
        """Writes the batch's KV into the pool; float32 [sampled rows, vocab].

        tokens: those of all rows, one row after the other; sampled: the rows whose last token's logits count.
        """
        assert len(tokens) == sum(row.queries for row in rows), "the rows own the tokens"
        ids = np.array(tokens, dtype=np.int32)
        assert ((ids >= 0) & (ids < self._vocab)).all(), "token ids are in the vocabulary"
        sequences, tables = _sequences(rows)
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
        )
        self._kernels.library.diptych_decoder_run(self._decoder, byref(batch))
        self._tokens = len(ids)
        del tables
        return logits

    def logits_at(self, tokens: Sequence[int]) -> Tensor:
        """After any of the tokens of the last `logits`: float32 [tokens, vocab]."""
        places = np.array(tokens, dtype=np.int32)
        assert ((places >= 0) & (places < self._tokens)).all(), "they are of the last batch"
        assert len(places) <= self._tokens, "there is room for as many rows as the batch had"
        logits = torch.empty((len(places), self._vocab))
        self._kernels.library.diptych_decoder_unembed(
            self._decoder, places.ctypes.data, len(places), logits.data_ptr()
        )
        return logits


def kv_token_bytes(dim: int) -> int:
    """Of a token of a head in a pool of int8: codes in fours, and their scale."""
    return -(-dim // 4) * 4 + 4


def _sequences(rows: Sequence[AttentionRow]) -> tuple[NDArray[np.void], NDArray[np.int32]]:
    """The rows for C++, and their block tables, which must live as long as these are used."""
    sequences = np.empty(len(rows), dtype=SEQUENCE)
    lengths = [len(row.block_table) for row in rows]
    tables = np.concatenate([np.array(row.block_table, dtype=np.int32) for row in rows])
    sequences["queries"] = queries = [row.queries for row in rows]
    sequences["first"] = np.cumsum(queries) - queries
    sequences["start"] = [row.start for row in rows]
    sequences["table"] = tables.ctypes.data + tables.itemsize * (np.cumsum(lengths) - lengths)
    return sequences, tables


def _pool_struct(pool: Tensor, dim: int) -> PoolStruct:
    assert pool.is_contiguous(), "C++ reads blocks one after the other"
    _, layers, _, kv_heads, block_size, last = pool.shape
    assert last == (dim if pool.dtype == torch.float32 else kv_token_bytes(dim)), "rows fit the heads"
    return PoolStruct(pool.data_ptr(), layers, kv_heads, block_size, dim, 8 * pool.itemsize)


def _model_struct(model: Int8Model, pool: Tensor) -> ModelStruct:
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
        pool=_pool_struct(pool, model.head_dim),
    )


def _layer_struct(layer: Int8Layer) -> LayerStruct:
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
