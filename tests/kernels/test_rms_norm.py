import pytest
import torch

from kernels.reference.rms_norm import rms_norm


@pytest.mark.parametrize("width", [1, 7, 576])
def test_rms_norm_equals_its_formula_written_with_loops(width: int) -> None:
    x, weight = torch.randn(5, width), torch.randn(width)
    y = rms_norm(x, weight, 1e-5)
    for row in range(5):
        size = (sum(float(value) ** 2 for value in x[row]) / width + 1e-5) ** 0.5
        assert torch.allclose(y[row], x[row] / size * weight, atol=1e-5)


def test_rms_norm_of_large_half_precision_values_does_not_overflow() -> None:
    x = torch.full((1, 8), 30000.0, dtype=torch.float16)  # its square is infinite in float16
    y = rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-5)
    assert y.dtype == torch.float16
    assert torch.allclose(y.float(), torch.ones(1, 8), atol=1e-2)
