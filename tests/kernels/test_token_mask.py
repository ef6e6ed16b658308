import torch

from kernels import ops


def test_exactly_the_tokens_whose_bit_is_set_keep_their_logits() -> None:
    logits = torch.randn(3, 100)
    logits[0, 7] = -torch.inf
    allowed = torch.rand(3, 128) < 0.3
    words = (allowed.view(3, 4, 32).long() << torch.arange(32)).sum(dim=-1).to(torch.int32)
    expected = logits.masked_fill(~allowed[:, :100], -torch.inf)
    assert torch.equal(ops.allow(logits, words), expected)
