"""Root mean square normalisation.

    y[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension of `x`; `weight` broadcasts against `x`. Keeps the dtype of `x`."""
    # The mean is taken in float32: squares of half-precision activations overflow.
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight
