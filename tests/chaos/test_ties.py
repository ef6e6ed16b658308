"""Two answers part at a tie only where the scores, noise included, are nearly the same."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from services.core.sampling import SamplingParams
from services.engine.device.sampler import sample_tokens
from services.engine.runner import Sample
from tests.chaos.ties import TieJudge
from tests.chaos.workload import Ask
from tests.support.completions import MODEL

VOCAB = 49152
SAMPLED = {"temperature": 0.7, "seed": 11, "top_k": 40, "n": 3}
CHOICE = 2  # whose noise is not the first choice's


def logits_where_second_is_behind(by: float) -> torch.Tensor:
    logits = torch.zeros(VOCAB)
    logits[7], logits[9] = 20.0, 20.0 - by
    return logits


def ask(**sampling: object) -> Ask:
    return Ask(0, "greedy", "/v1/completions", {"model": MODEL, "prompt": "a b", "max_tokens": 8, **sampling})


def judge(model: Path, logits: torch.Tensor) -> TieJudge:
    return TieJudge(model, lambda token_ids: logits)


@pytest.mark.parametrize(("behind", "tie"), [(5e-4, True), (5e-3, False)])
async def test_greedy_answers_part_at_a_tie_if_the_two_best_logits_are_near(
    default_model: Path, behind: float, tie: bool
) -> None:
    near = judge(default_model, logits_where_second_is_behind(behind))
    assert await near.parts_at_tie(ask(temperature=0), 0, [3, 7, 1], [3, 9, 1]) is tie
    assert not await near.parts_at_tie(ask(temperature=0), 0, [3, 7, 1], [3, 8, 1]), "a third token"


@pytest.mark.parametrize(("behind", "tie"), [(3e-4, True), (5e-3, False)])
async def test_sampled_answers_part_at_a_tie_if_the_two_best_noisy_scores_are_near(
    default_model: Path, behind: float, tie: bool
) -> None:
    exact = logits_at_equal_noisy_scores(default_model)
    best, second = exact.topk(2).indices.tolist()
    exact[second] -= behind
    near = judge(default_model, exact)
    assert await near.parts_at_tie(ask(**SAMPLED), CHOICE, [best], [second]) is tie


async def test_an_answer_that_ends_earlier_is_no_tie(default_model: Path) -> None:
    def unused(token_ids: Sequence[int]) -> torch.Tensor:
        raise AssertionError("there is no token to judge")

    assert not await TieJudge(default_model, unused).parts_at_tie(ask(), 0, [3, 7], [3, 7, 1])


def logits_at_equal_noisy_scores(model: Path) -> torch.Tensor:
    """Logits where tokens 7 and 9, with their noise, are level: found by bisection."""
    params = SamplingParams(max_tokens=8, temperature=0.7, seed=11, top_k=40)
    logits = logits_where_second_is_behind(0.0)
    low, high = -20.0, 20.0
    for _ in range(24):  # to 40 / 2**24 = 2e-6: what a float32 near 20 resolves
        logits[9] = 20.0 + (low + high) / 2
        wins = sample_tokens(logits[None], [Sample(params, [1], [], CHOICE)]) == [9]
        low, high = (low, (low + high) / 2) if wins else ((low + high) / 2, high)
    return logits
