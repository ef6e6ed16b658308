"""The gated unit of the feed-forward layer, on the fused output of its two projections.

    y = silu(gate) * up      with      [gate | up] = x      and      silu(a) = a / (1 + exp(-a))

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 * width] -> [..., width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
