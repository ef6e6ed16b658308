"""float32 projections on a CPU through oneDNN, with weights packed into its blocked layout.

torch gives a float32 `F.linear` to MKL, which runs slowly on processors of other makers: on one core
of an AMD EPYC, 42 MB of weights took 2.5 ms for 1 token, 8.2 ms for 32 and 48 ms for 256; oneDNN with
packed weights took 1.2, 3.5 and 20 ms. Its results for a token also do not depend on how many other
tokens are in the batch, except that a single token takes another path, which is avoided here.
"""

import torch
from torch import Tensor


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN takes this weight: float32 on a CPU that torch has oneDNN for."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return on_cpu and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def pack(weight: Tensor) -> Tensor:
    """An opaque tensor for `packed_linear` that holds `weight` [outputs, inputs] in oneDNN's layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """[tokens, inputs] -> [tokens, outputs]."""
    # For one token oneDNN sums long inputs (over 1024) in another order than for two or more. Running
    # it twice costs 5 % and keeps a sequence's numbers the same whatever else is in its batch.
    tokens = x.shape[0]
    rows = x.expand(2, -1).contiguous() if tokens == 1 else x
    y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return y[:tokens]
