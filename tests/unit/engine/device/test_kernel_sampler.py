"""The C++ kernels choose the tokens that torch chooses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu.build import LEVELS, KernelsUnavailable, processor_features
from kernels.cpu.kernels import CpuKernels
from services.core.sampling import SamplingParams
from services.engine.device.sampler import Choose, choose_with_kernels, choose_with_torch, sample_tokens
from services.engine.runner import Sample
from services.model.home import diptych_home
from tests.unit.engine.device.test_sampler import VARIED, params, sample


@pytest.fixture(scope="module", params=LEVELS)
def choose(request: pytest.FixtureRequest) -> Choose:
    if not LEVELS[request.param][0] <= processor_features():
        pytest.skip(f"this processor has no {request.param}")
    try:
        return choose_with_kernels(CpuKernels(diptych_home() / "kernels", 1, request.param))
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@settings(max_examples=100)
@given(
    vocab=st.sampled_from([1, 3, 63, 64, 65, 500, 5000, 40_000]),
    # Not less: both round each weight of top_p's sum to float32, and neighbours must differ by more.
    spread=st.sampled_from([0.1, 1.0, 4.0]),
    temperature=st.sampled_from([1e-6, 0.3, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 2, 40, 400, 10**6]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    seed=st.integers(-(2**63), 2**64),
    choice=st.integers(0, 5),
)
def test_tokens_are_those_of_torch_whatever_the_parameters(
    choose: Choose,
    vocab: int,
    spread: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    choice: int,
) -> None:
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(seed % 2**62)) * spread
    samples = [
        Sample(
            SamplingParams(
                max_tokens=9, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed + row
            ),
            [],
            [7] * row,
            choice,
        )
        for row in range(4)
    ]
    assert choose(logits, samples) == choose_with_torch(logits, samples)


def test_many_plain_draws_are_those_of_torch(choose: Choose) -> None:
    logits = (torch.randn(1, 49152) * 3).expand(60, -1)
    samples = [sample(params(1.0, seed=seed)) for seed in range(60)]
    tokens = choose(logits, samples)
    assert tokens == choose_with_torch(logits, samples)
    assert len(set(tokens)) > 20


def test_penalties_come_before_the_choice(choose: Choose) -> None:
    logits = torch.randn(len(VARIED), 1000) * 2
    samples = [sample(p, output=tuple(range(row)), choice=row % 4) for row, p in enumerate(VARIED)]
    assert sample_tokens(logits, samples, choose) == sample_tokens(logits, samples)


def test_equal_scores_are_treated_as_torch_does(choose: Choose) -> None:
    logits = torch.zeros(3, 300)
    logits[:, 100:120] = 1.0
    for p in (params(0.0), params(top_k=5), params(top_p=0.05), params(min_p=0.9), params()):
        assert choose(logits, [sample(p)] * 3) == choose_with_torch(logits, [sample(p)] * 3)


@pytest.mark.parametrize("vocab", [70, 128])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_number_still_gives_a_token_of_the_vocabulary(
    choose: Choose, vocab: int, value: float
) -> None:
    logits = torch.full((4, vocab), value)
    limits = [params(0.0), params(), params(top_k=3), params(top_p=0.5, min_p=0.1)]
    assert all(0 <= token < vocab for token in choose(logits, [sample(p) for p in limits]))
