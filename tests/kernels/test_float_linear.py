"""The C++ projections with float32 weights: what they compute, and that it depends on nothing but the row."""

import pytest
import torch

from kernels.cpu.kernels import CpuKernels
from kernels.cpu.packed_weight import pack_float_gate_up, pack_floats

# (outputs, inputs): multiples of the kernels' blocks, less, and more.
SHAPES = [(32, 32), (1, 1), (33, 31), (7, 200), (960, 576), (64, 1536)]


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 13, 14, 15, 40])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_a_projection_is_exact_but_for_the_rounding_of_its_sums(
    every_kernels: CpuKernels, outputs: int, inputs: int, rows: int
) -> None:
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs) * 3
    y = every_kernels.linear(x, pack_floats(weight))
    scale = x.double().abs() @ weight.double().abs().T
    assert float(((y.double() - x.double() @ weight.double().T).abs() / scale).max()) < 2e-6


def test_rows_of_any_size_are_bitwise_the_same_alone_and_together(
    kernels: CpuKernels, two_threads: CpuKernels
) -> None:
    weight = pack_floats(torch.randn(200, 320))
    x = torch.randn(1300, 320) * torch.logspace(-20, 15, 1300).unsqueeze(1)
    x[600] = torch.nan
    together = kernels.linear(x, weight)
    assert torch.equal(together[:600], two_threads.linear(x, weight)[:600])
    for first, count in ((0, 1), (5, 1), (1299, 1), (3, 2), (100, 7), (13, 64), (601, 400)):
        part = slice(first, first + count)
        assert torch.equal(kernels.linear(x[part], weight), together[part])


def test_gate_and_up_come_out_by_turns(kernels: CpuKernels) -> None:
    weight, x = torch.randn(2 * 40, 32), torch.randn(3, 32)
    by_turns = kernels.linear(x, pack_float_gate_up(weight)).view(3, -1, 2, 16)
    gate, up = by_turns[:, :, 0].flatten(1), by_turns[:, :, 1].flatten(1)
    whole = kernels.linear(x, pack_floats(weight))
    assert torch.equal(torch.cat((gate[:, :40], up[:, :40]), dim=1), whole)
