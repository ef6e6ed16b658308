import math

import torch

from kernels.reference.swiglu import swiglu


def test_swiglu_equals_its_formula_and_leaves_its_input() -> None:
    x = torch.randn(3, 2 * 11)
    before = x.clone()
    y = swiglu(x)
    for row in range(3):
        for column in range(11):
            gate, up = float(x[row, column]), float(x[row, 11 + column])
            assert math.isclose(float(y[row, column]), gate / (1 + math.exp(-gate)) * up, abs_tol=1e-5)
    assert torch.equal(x, before)
