"""FusedTensor: file tensors below each other, as one, read when it is asked for.

It is filled part by part: beside the finished one only one file tensor is in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.packed_weight import Groups
from services.engine.device.tensor_source import TensorSource


@dataclass(frozen=True, slots=True)
class FusedTensor:
    """Its parts have the shapes [rows, *columns]. Reading raises ModelFileError."""

    source: TensorSource
    names: Sequence[str]
    rows: Sequence[int]
    columns: tuple[int, ...]
    dtype: torch.dtype  # of `floats`
    device: torch.device

    def floats(self) -> Tensor:
        fused = torch.empty((sum(self.rows), *self.columns), dtype=self.dtype, device=self.device)
        for name, count, part in zip(self.names, self.rows, torch.split(fused, list(self.rows)), strict=True):
            part.copy_(self.source.read(name, (count, *self.columns)))
        return fused

    def groups(self) -> Groups:
        """The file's own if all parts have them, of as many bits; else 8 bits for the floats."""
        parts = [
            self.source.read_groups(name, (count, *self.columns))
            for name, count in zip(self.names, self.rows, strict=True)
        ]
        whole = [part for part in parts if part is not None]
        if len(whole) == len(parts) and len({part.bits for part in whole}) == 1:
            return Groups.below_each_other(whole)
        return Groups.of(self.floats())
