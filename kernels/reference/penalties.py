"""What a sequence's own tokens do to its next logits.

    repetition   x[t] / r if x[t] > 0 else x[t] * r      for t in the prompt or the output
    frequency    x[t] - f * count[t]                     count[t]: how often t is in the output
    presence     x[t] - p                                for t in the output

Sources: Keskar et al., "CTRL", 2019 (repetition); the OpenAI API reference (frequency, presence).
"""

import torch
from torch import Tensor


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits: [vocab]; seen: int64 [tokens], the ids of prompt and output, repeated or not."""
    values = logits[seen]
    return logits.scatter(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def penalize_output(logits: Tensor, output: Tensor, frequency: float, presence: float) -> Tensor:
    """logits: [vocab]; output: int64 [tokens], the ids of the output in any order."""
    counts = output.bincount(minlength=len(logits)).to(logits.dtype)
    return logits - frequency * counts - presence * (counts > 0)


def add_bias(logits: Tensor, ids: Tensor, bias: Tensor) -> Tensor:
    """logits: [vocab]; ids: int64 [tokens], all different; bias: float32 [tokens]."""
    return logits.index_add(0, ids, bias.to(logits.dtype))


def forbid(logits: Tensor, ids: Tensor) -> Tensor:
    """logits: [vocab]; ids: int64 [tokens] that must not be chosen."""
    return logits.index_fill(0, ids, -torch.inf)
