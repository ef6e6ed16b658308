"""Weights in groups of 32 inputs, as model files have them (Groups) and as `source/packed.h` has them.

A group has integers of 4 or 8 bits and a scale, with 4 bits a minimum too: w = scale * q (+ minimum).
What a file has in this form keeps its numbers; other weights become 8 bits. Or weights stay float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import PackedStruct

GROUP = 32  # inputs that share a scale
COLUMNS = 32  # outputs that lie together
_VALUES_AT_ONCE = 2**18  # 1 MiB of floats stay in the cache
_GATE_COLUMNS = COLUMNS // 2  # of gate, and then as many of up: see `swiglu` in source/decoder.h


@dataclass(frozen=True, slots=True)
class Groups:
    """A weight [outputs, inputs], with zeros behind the inputs up to whole groups."""

    inputs: int
    values: Tensor  # [outputs, groups * GROUP]: int8, or with minimums uint8 below 16
    scales: Tensor  # float16 [outputs, groups]
    minimums: Tensor | None = None  # float16 [outputs, groups]

    @classmethod
    def of(cls, weight: Tensor) -> "Groups":
        """8 bits for float [outputs, inputs]. A part at a time: large weights are not in memory twice."""
        rows = max(1, _VALUES_AT_ONCE // weight.shape[1])
        return cls.below_each_other([_eight_bits(part) for part in torch.split(weight, rows)])

    @classmethod
    def below_each_other(cls, parts: Sequence["Groups"]) -> "Groups":
        """Parts with as many bits."""
        minimums = [part.minimums for part in parts if part.minimums is not None]
        return cls(
            parts[0].inputs,
            torch.cat([part.values for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat(minimums) if minimums else None,
        )

    @property
    def bits(self) -> int:
        return 8 if self.minimums is None else 4

    def rearranged(self, rows: Callable[[Tensor], Tensor]) -> "Groups":
        """With each of its tensors [outputs, ..] put in another order by `rows`."""
        minimums = None if self.minimums is None else rows(self.minimums)
        return Groups(self.inputs, rows(self.values), rows(self.scales), minimums)

    def dequantized(self) -> Tensor:
        """float32 [outputs, inputs]."""
        values: Tensor = self.values.view(*self.scales.shape, GROUP) * self.scales.float().unsqueeze(-1)
        if self.minimums is not None:
            values += self.minimums.float().unsqueeze(-1)
        return values.flatten(1)[:, : self.inputs]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [outputs, inputs] in the kernels' layout."""

    outputs: int
    inputs: int
    bits: int
    units: (
        Tensor  # uint8 [output blocks, groups, bytes of a FourBit or an EightBit]; 32 bits: see `pack_floats`
    )

    @property
    def struct(self) -> PackedStruct:
        return PackedStruct(self.outputs, self.inputs, self.bits, self.units.data_ptr())


def pack(weight: Groups) -> PackedWeight:
    outputs = len(weight.values)
    weight = weight.rearranged(lambda rows: F.pad(rows, (0, 0, 0, -outputs % COLUMNS)))
    numbers = [weight.scales] if weight.minimums is None else [weight.scales, weight.minimums]
    parts = [*(_by_unit(each, torch.float16, 1) for each in numbers), _weights_by_unit(weight)]
    return PackedWeight(outputs, weight.inputs, weight.bits, torch.cat(parts, dim=2))


def pack_gate_up(weight: Groups) -> PackedWeight:
    """[gate | up], [2 * intermediate, inputs], with the two by turns."""
    return pack(weight.rearranged(_by_turns))


def pack_floats(weight: Tensor) -> PackedWeight:
    """Keeps float32 [outputs, inputs]; units: float32 [output blocks, inputs, COLUMNS]."""
    outputs, inputs = weight.shape
    blocks = F.pad(weight, (0, 0, 0, -outputs % COLUMNS)).view(-1, COLUMNS, inputs)
    return PackedWeight(outputs, inputs, 32, blocks.transpose(1, 2).contiguous())


def pack_float_gate_up(weight: Tensor) -> PackedWeight:
    """[gate | up], [2 * intermediate, inputs], with the two by turns."""
    return pack_floats(_by_turns(weight))


def _eight_bits(weight: Tensor) -> Groups:
    groups = F.pad(weight.float(), (0, -weight.shape[1] % GROUP)).view(len(weight), -1, GROUP)
    scales = _float16_not_below(groups.abs().amax(-1) / 127)
    inverse = torch.where(scales > 0, 1 / scales.float(), 0)
    values = (groups * inverse.unsqueeze(-1)).round_().clamp_(-127, 127)
    return Groups(weight.shape[1], values.to(torch.int8).flatten(1), scales)


def _by_turns(rows: Tensor) -> Tensor:
    """[2 * n, ..]: so many of the first half, then of the second, with zeros behind each."""
    padding = (0, 0, 0, -(len(rows) // 2) % _GATE_COLUMNS)
    halves = [F.pad(half, padding).view(-1, _GATE_COLUMNS, rows.shape[1]) for half in rows.chunk(2)]
    return torch.stack(halves, dim=1).flatten(0, 2)


def _weights_by_unit(groups: Groups) -> Tensor:
    if groups.minimums is None:
        return _by_unit(groups.values.view(torch.uint8) ^ 0x80, torch.int32, GROUP // 4)
    low, high = groups.values.view(len(groups.values), -1, 2, 4).unbind(2)
    return _by_unit((low | high << 4).flatten(1), torch.int32, GROUP // 8)


def _by_unit(rows: Tensor, items: torch.dtype, per_group: int) -> Tensor:
    """[outputs, n] as uint8 [blocks, groups, bytes]: a group's items, each for all outputs of a block."""
    blocks = rows.contiguous().view(items).view(len(rows) // COLUMNS, COLUMNS, -1, per_group)
    return blocks.permute(0, 2, 3, 1).flatten(2).contiguous().view(torch.uint8)


def _float16_not_below(numbers: Tensor) -> Tensor:
    """Rounded up, so that no quotient by it is larger than one by the number."""
    rounded = numbers.half()
    return torch.where(rounded.float() < numbers, _next_float16(rounded), rounded)


def _next_float16(numbers: Tensor) -> Tensor:
    """The next larger ones of numbers that are not negative."""
    return (numbers.view(torch.int16) + 1).view(torch.float16)
