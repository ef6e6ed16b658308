"""The C++ projections: what they compute, and that it depends on nothing but the row."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.int8 import Int8Kernels, PackedWeight

GROUP = 32
# (outputs, inputs): multiples of the kernels' blocks and groups, less, and more.
SHAPES = [(32, 32), (1, 1), (33, 31), (100, 96), (7, 200), (960, 576), (64, 1536)]


def quantized(x: Tensor) -> Tensor:
    """Activations as the kernels round them: 8 bits, one scale per row and group, in float64."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    top = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(top > 0, 127.0 / top, 0.0)
    return ((padded * inverse).round().double() * (top / 127.0).double()).flatten(1)[:, : x.shape[1]]


def expected(x: Tensor, weight: PackedWeight) -> Tensor:
    return quantized(x) @ weight.dequantized().double().T


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_packing_keeps_each_weight_to_half_a_step_of_its_group(
    kernels: Int8Kernels, outputs: int, inputs: int
) -> None:
    weight = torch.randn(outputs, inputs) * torch.rand(outputs, 1).exp()
    packed = kernels.pack(weight)
    padded = torch.nn.functional.pad(weight, (0, -inputs % GROUP)).unflatten(1, (-1, GROUP))
    step = (padded.abs().amax(-1, keepdim=True) / 127).expand_as(padded).flatten(1)[:, :inputs]
    assert ((packed.dequantized() - weight).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 64])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_projection_is_exact_but_for_the_rounding_of_its_sums(
    every_kernels: Int8Kernels, outputs: int, inputs: int, rows: int
) -> None:
    packed = every_kernels.pack(torch.randn(outputs, inputs))
    x = torch.randn(rows, inputs) * 3
    y = every_kernels.linear(x, packed)
    exact = expected(x, packed)
    scale = (quantized(x).abs() @ packed.dequantized().double().abs().T).clamp(min=1e-30)
    assert float(((y.double() - exact).abs() / scale).max()) < 2e-6


def test_rows_of_any_size_are_bitwise_the_same_alone_and_together(
    kernels: Int8Kernels, two_threads: Int8Kernels
) -> None:
    packed = kernels.pack(torch.randn(200, 300))
    x = torch.randn(700, 300) * torch.logspace(-20, 15, 700).unsqueeze(1)
    together = kernels.linear(x, packed)
    assert torch.equal(together, two_threads.linear(x, packed))
    for first, count in ((0, 1), (5, 1), (699, 1), (3, 2), (100, 7), (13, 64)):
        part = slice(first, first + count)
        assert torch.equal(kernels.linear(x[part], packed), together[part])


def test_every_level_gives_the_same_bits(every_kernels: Int8Kernels, plain: Int8Kernels) -> None:
    packed = every_kernels.pack(torch.randn(96, 576))
    x = torch.randn(9, 576)
    assert torch.equal(every_kernels.linear(x, packed), plain.linear(x, packed))


def test_extreme_rows_change_nothing_in_the_others(kernels: Int8Kernels) -> None:
    packed = kernels.pack(torch.randn(40, 64))
    x = torch.randn(8, 64)
    alone = kernels.linear(x, packed)
    x[2], x[3], x[4, 5], x[6] = 0.0, torch.inf, torch.nan, 3e38
    y = kernels.linear(x, packed)
    calm = [0, 1, 5, 7]
    assert torch.equal(y[calm], alone[calm])
    assert (y[2] == 0).all()


def test_gate_and_up_come_out_by_turns(kernels: Int8Kernels) -> None:
    gate_up = torch.randn(2 * 40, 32)
    packed = kernels.pack_gate_up(gate_up).dequantized().unflatten(0, (-1, 2, 16))
    gate, up = packed[:, 0].flatten(0, 1), packed[:, 1].flatten(0, 1)
    whole = kernels.pack(gate_up).dequantized()
    assert torch.equal(gate[:40], whole[:40])
    assert torch.equal(up[:40], whole[40:])
    assert not gate[40:].any()
    assert not up[40:].any()
