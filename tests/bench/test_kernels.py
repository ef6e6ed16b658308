"""The pure parts of the kernels' benchmark."""

import math

import pytest
import torch

from tests.bench.kernels import best_times, closeness


def test_equal_models_are_as_close_as_can_be() -> None:
    logits = torch.randn(5, 9)
    result = closeness(iter([(logits, logits + 3.0, torch.arange(5))]))
    assert result.divergence == pytest.approx(0, abs=1e-7)
    assert result.perplexity_change == pytest.approx(0, abs=1e-7)
    assert (result.tokens, result.agreement) == (5, 1.0)


def test_closeness_is_the_mean_over_all_tokens_of_all_pieces() -> None:
    exact = torch.log(torch.tensor([[0.5, 0.5], [0.8, 0.2]]))
    near = torch.log(torch.tensor([[0.25, 0.75], [0.6, 0.4]]))
    pieces = [(exact[:1], near[:1], torch.tensor([0])), (exact[1:], near[1:], torch.tensor([1]))]
    result = closeness(iter(pieces))
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.8 * math.log(0.8 / 0.6) + 0.2 * math.log(0.2 / 0.4)
    assert result.divergence == pytest.approx((first + second) / 2)
    assert result.exact_loss == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2)
    assert result.near_loss == pytest.approx(-(math.log(0.25) + math.log(0.4)) / 2)
    assert result.agreement == 0.5


def test_sides_run_by_turns() -> None:
    calls: list[str] = []
    best_times([lambda: calls.append("a"), lambda: calls.append("b")], rounds=2)
    assert calls == ["a", "b"] * 3
