"""The C++ kernels, called with tensors. Shapes are checked here; C++ trusts its caller.

A call computes in a team of threads, and lets other Python threads run meanwhile. What a token gives depends
on that token's numbers and context alone, to the last bit: not on the batch, the threads, or how a prompt was
cut into chunks (`source/linear.h`, `source/attention.h`).
"""

from collections.abc import Sequence
from ctypes import byref
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.build import processor_level
from kernels.cpu.core_slots import CoreSlots
from kernels.cpu.library import SEQUENCE, PoolStruct, load_library
from kernels.cpu.packed_weight import PackedWeight
from kernels.reference.attention_plan import AttentionRow


class CpuKernels:
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
            byref(pool_struct(pool, k.shape[2])),
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
        sequences, tables = sequences_of(rows)
        self.library.diptych_attention(
            self.team,
            byref(pool_struct(pool, q.shape[2])),
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


def kv_token_bytes(dim: int) -> int:
    """Of a token of a head in a pool of int8: codes in fours, and their scale."""
    return -(-dim // 4) * 4 + 4


def sequences_of(rows: Sequence[AttentionRow]) -> tuple[NDArray[np.void], NDArray[np.int32]]:
    """The rows for C++, and their block tables, which must live as long as these are used."""
    sequences = np.empty(len(rows), dtype=SEQUENCE)
    lengths = [len(row.block_table) for row in rows]
    tables = np.concatenate([np.array(row.block_table, dtype=np.int32) for row in rows])
    sequences["queries"] = queries = [row.queries for row in rows]
    sequences["first"] = np.cumsum(queries) - queries
    sequences["start"] = [row.start for row in rows]
    sequences["table"] = tables.ctypes.data + tables.itemsize * (np.cumsum(lengths) - lengths)
    return sequences, tables


def pool_struct(pool: Tensor, dim: int) -> PoolStruct:
    assert pool.is_contiguous(), "C++ reads blocks one after the other"
    _, layers, _, kv_heads, block_size, last = pool.shape
    assert last == (dim if pool.dtype == torch.float32 else kv_token_bytes(dim)), "rows fit the heads"
    return PoolStruct(pool.data_ptr(), layers, kv_heads, block_size, dim, 8 * pool.itemsize)
