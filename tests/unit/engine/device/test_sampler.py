import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.core.sampling import SamplingParams
from services.engine.device.sampler import sample_tokens
from services.engine.runner import Sample


def params(temperature: float = 1.0, **others: object) -> SamplingParams:
    return SamplingParams(max_tokens=100, temperature=temperature, **others)  # type: ignore[arg-type]


def sample(
    p: SamplingParams,
    prompt: tuple[int, ...] = (1, 2, 3),
    output: tuple[int, ...] = (4, 5),
    choice: int = 0,
) -> Sample:
    return Sample(p, prompt, output, choice)


VARIED = [
    params(0.0),
    params(1.0, seed=1),
    params(0.7, seed=2, top_k=20),
    params(1.5, seed=3, top_p=0.8),
    params(1.0, seed=4, min_p=0.1),
    params(0.9, seed=2**64 - 5, top_k=50, top_p=0.9, min_p=0.02),
    params(0.0, repetition_penalty=1.3),
    params(1.0, seed=-7, frequency_penalty=0.5, presence_penalty=-0.4),
    params(1.0, seed=8, min_tokens=9, end_token_ids=(0, 7, 10**6)),
    params(1.0, seed=9, logit_bias={5: 4.0, 6: -100.0}, bad_words=((1,), (7, 8, 9))),
    params(0.8, seed=10, top_k=9, allowed_token_ids=(3, 9, 27, 81, 243)),
]


def test_a_row_gives_the_same_token_in_every_batch() -> None:
    logits = torch.randn(len(VARIED), 1000) * 2
    samples = [sample(p, output=tuple(range(row)), choice=row % 4) for row, p in enumerate(VARIED)]
    together = sample_tokens(logits, samples)
    alone = [sample_tokens(logits[row : row + 1], [each])[0] for row, each in enumerate(samples)]
    order = torch.randperm(len(VARIED)).tolist()
    shuffled = sample_tokens(logits[order], [samples[row] for row in order])
    assert together == alone
    assert shuffled == [alone[row] for row in order]


def test_sampling_leaves_the_logits_as_they_are() -> None:
    logits = torch.randn(len(VARIED), 1000)
    before = logits.clone()
    sample_tokens(logits, [sample(p) for p in VARIED])
    assert torch.equal(logits, before)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(2, 500)
    logits[0, [37, 400]] = 1.0
    assert sample_tokens(logits, [sample(params(0.0))] * 2) == [37, 0]


def test_seed_choice_and_output_index_each_change_the_draw() -> None:
    logits = torch.zeros(1, 5000)
    by_seed = {sample_tokens(logits, [sample(params(seed=seed))])[0] for seed in range(50)}
    by_index = {sample_tokens(logits, [sample(params(), output=(9,) * n)])[0] for n in range(50)}
    by_choice = {sample_tokens(logits, [sample(params(), choice=choice)])[0] for choice in range(50)}
    assert len(by_choice) > 45
    assert len(by_seed) > 45
    assert len(by_index) > 45
    # What precedes the output does not: only its length is part of the key.
    assert len({sample_tokens(logits, [sample(params(), output=(n, n))])[0] for n in range(20)}) == 1


@pytest.mark.parametrize(
    "limits",
    [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 30, "top_p": 0.8, "min_p": 0.05}],
    ids=str,
)
def test_draws_follow_the_distribution_that_transformers_warps_to(limits: dict[str, float]) -> None:
    draws, vocab = 20_000, 60
    logits = torch.randn(1, vocab) * 2
    p = params(0.8, repetition_penalty=1.2, **limits)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(0.8)])
    if p.top_k:
        warpers.append(TopKLogitsWarper(p.top_k))
    if p.top_p < 1:
        warpers.append(TopPLogitsWarper(p.top_p))
    if p.min_p:
        warpers.append(MinPLogitsWarper(p.min_p))
    expected = warpers(ids, logits.clone())[0].double().softmax(0) * draws
    samples = [sample(params(0.8, seed=n, repetition_penalty=1.2, **limits)) for n in range(draws)]
    tokens = torch.tensor(sample_tokens(logits.expand(draws, -1), samples))
    counts = tokens.bincount(minlength=vocab).double()
    assert int(counts[expected == 0].sum()) == 0
    common = expected > 5
    excess = float(((counts - expected).square() / expected)[common].sum())
    freedom = int(common.sum()) - 1
    assert excess < freedom + 8 * (2 * freedom) ** 0.5  # chi-square: p < 0.001


def test_ends_are_impossible_until_they_would_count_as_an_end() -> None:
    logits = torch.zeros(1, 100)
    logits[0, [6, 7]] = 50.0
    for temperature in (0.0, 1.0):
        p = params(temperature, min_tokens=3, end_token_ids=(6, 7))
        for length in range(5):
            (token,) = sample_tokens(logits, [sample(p, output=(1,) * length)])
            assert (token in (6, 7)) == (length + 1 >= p.min_tokens)
            assert token not in (6, 7) or p.finish(token, length + 1) == "stop"


def test_penalties_shift_greedy_choices() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 4], logits[0, 50], logits[0, 2] = 3.0, 2.5, 2.9
    assert sample_tokens(logits, [sample(params(0.0))]) == [4]
    # 4 is in the output, 2 only in the prompt: output penalties spare it, repetition does not.
    assert sample_tokens(logits, [sample(params(0.0, presence_penalty=1.0))]) == [2]
    assert sample_tokens(logits, [sample(params(0.0, repetition_penalty=1.3))]) == [50]
    twice = sample(params(0.0, frequency_penalty=0.03), output=(4, 4, 4, 4))
    assert sample_tokens(logits, [twice]) == [2]
    assert sample_tokens(logits, [sample(params(0.0, frequency_penalty=2.0), output=())]) == [4]
