"""The C++ projections: what they compute, and that it depends on nothing but the row."""

import pytest
import torch
from torch import Tensor

from kernels.cpu.kernels import CpuKernels
from kernels.cpu.packed_weight import GROUP, Groups, pack, pack_gate_up

# (outputs, inputs): multiples of the kernels' blocks and groups, less, and more.
SHAPES = [(32, 32), (1, 1), (33, 31), (100, 96), (7, 200), (960, 576), (64, 1536)]
BITS_AND_SHAPES = [
    (bits, *shape) for shape in SHAPES for bits in (4, 8) if bits == 8 or shape[1] % GROUP == 0
]


def quantized(x: Tensor) -> Tensor:
    """Activations as the kernels round them: 8 bits, one scale per row and group, in float64."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    top = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(top > 0, 127.0 / top, 0.0)
    return ((padded * inverse).round().double() * (top / 127.0).double()).flatten(1)[:, : x.shape[1]]


def expected(x: Tensor, weight: Groups) -> Tensor:
    return quantized(x) @ weight.dequantized().double().T


def random_groups(bits: int, outputs: int, inputs: int) -> Groups:
    """A weight of this many bits. With 4 the inputs are whole groups, as in files."""
    if bits == 8:
        return Groups.of(torch.randn(outputs, inputs))
    values = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    scales, minimums = torch.rand(2, outputs, inputs // GROUP).half()
    return Groups(inputs, values, scales, minimums * -9)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_8_bits_keep_each_weight_to_half_a_step_of_its_group(outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs) * torch.rand(outputs, 1).exp()
    groups = Groups.of(weight)
    padded = torch.nn.functional.pad(weight, (0, -inputs % GROUP)).view(outputs, -1, GROUP)
    step = padded.abs().amax(-1) / 127
    assert ((groups.scales >= step) & (groups.scales <= step * 1.001)).all()
    error = (groups.values.view_as(padded) * groups.scales.float().unsqueeze(-1) - padded).abs()
    assert (error <= groups.scales.float().unsqueeze(-1) * 0.5001).all()


def test_weights_too_small_or_too_large_for_float16_scales_are_zeros_or_not_finite() -> None:
    values = Groups.of(torch.tensor([[1e-30], [0.0], [-3e-6], [1e38]])).dequantized()[:, 0]
    assert values[:3].tolist() == [0.0, 0.0, pytest.approx(-3e-6, rel=0.02)]
    assert not values[3].isfinite()


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 64])
@pytest.mark.parametrize(("bits", "outputs", "inputs"), BITS_AND_SHAPES)
def test_a_projection_is_exact_but_for_the_rounding_of_its_sums(
    every_kernels: CpuKernels, bits: int, outputs: int, inputs: int, rows: int
) -> None:
    weight = random_groups(bits, outputs, inputs)
    x = torch.randn(rows, inputs) * 3
    y = every_kernels.linear(x, pack(weight))
    exact = expected(x, weight)
    largest = weight.dequantized().abs() if weight.minimums is None else weight.dequantized().abs() + 9
    scale = (quantized(x).abs() @ largest.double().T).clamp(min=1e-30)
    assert float(((y.double() - exact).abs() / scale).max()) < 2e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_any_size_are_bitwise_the_same_alone_and_together(
    kernels: CpuKernels, two_threads: CpuKernels, bits: int
) -> None:
    weight = pack(random_groups(bits, 200, 320))
    x = torch.randn(1300, 320) * torch.logspace(-20, 15, 1300).unsqueeze(1)
    together = kernels.linear(x, weight)
    assert torch.equal(together, two_threads.linear(x, weight))
    for first, count in ((0, 1), (5, 1), (1299, 1), (3, 2), (100, 7), (13, 64)):
        part = slice(first, first + count)
        assert torch.equal(kernels.linear(x[part], weight), together[part])


@pytest.mark.parametrize("bits", [4, 8])
def test_every_level_gives_the_same_bits(every_kernels: CpuKernels, plain: CpuKernels, bits: int) -> None:
    weight = pack(random_groups(bits, 96, 576))
    x = torch.randn(9, 576)
    assert torch.equal(every_kernels.linear(x, weight), plain.linear(x, weight))


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_the_largest_numbers_are_exact(every_kernels: CpuKernels, bits: int) -> None:
    """Every weight and activation at an end of its range: no sum on the way may overflow."""
    ends = (0, 15) if bits == 4 else (-128, 127)
    values = torch.tensor(ends)[torch.randint(0, 2, (64, 64))].to(torch.uint8 if bits == 4 else torch.int8)
    values[:2] = torch.tensor(ends).unsqueeze(1)
    ones = torch.ones(64, 2, dtype=torch.float16)
    x = torch.tensor((-127.0, 127.0))[torch.randint(0, 2, (9, 64))]
    x[:2] = torch.tensor((-127.0, 127.0)).unsqueeze(1)
    y = every_kernels.linear(x, pack(Groups(64, values, ones, ones * 0 if bits == 4 else None)))
    assert torch.equal(y, x @ values.float().T)


@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_rows_change_nothing_in_the_others(kernels: CpuKernels, bits: int) -> None:
    weight = pack(random_groups(bits, 40, 64))
    x = torch.randn(8, 64)
    alone = kernels.linear(x, weight)
    x[2], x[3], x[4, 5], x[6] = 0.0, torch.inf, torch.nan, 3e38
    y = kernels.linear(x, weight)
    calm = [0, 1, 5, 7]
    assert torch.equal(y[calm], alone[calm])
    assert (y[2] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_gate_and_up_come_out_by_turns(kernels: CpuKernels, bits: int) -> None:
    weight, x = random_groups(bits, 2 * 40, 32), torch.randn(3, 32)
    by_turns = kernels.linear(x, pack_gate_up(weight)).view(3, -1, 2, 16)
    gate, up = by_turns[:, :, 0].flatten(1), by_turns[:, :, 1].flatten(1)
    assert torch.equal(torch.cat((gate[:, :40], up[:, :40]), dim=1), kernels.linear(x, pack(weight)))
    assert not gate[:, 40:].any()
    assert not up[:, 40:].any()
