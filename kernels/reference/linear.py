"""A projection.

y = x W^T + b
"""

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[tokens, inputs] -> [tokens, outputs]; `weight` is [outputs, inputs], `bias` [outputs]."""
    return F.linear(x, weight, bias)
