"""Tokens that may be chosen, as bits."""

import torch
from torch import Tensor


def allow(logits: Tensor, words: Tensor) -> Tensor:
    """-inf for all tokens whose bit is not set. logits: [.., vocab]; words: int32 [.., at least vocab / 32],
    bit t % 32 of word t // 32 for token t (its lowest bit for t = 0, on little-endian machines)."""
    bits = words.view(torch.uint8).unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=words.device)
    allowed = (bits & 1).flatten(-2)[..., : logits.shape[-1]]
    return logits.masked_fill(allowed == 0, -torch.inf)
