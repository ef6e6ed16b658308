import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kernels.reference.sampling import (
    _GAMMA,
    _mix,
    gumbel_argmax,
    gumbel_noise,
    keep_min_p,
    keep_top_k,
    keep_top_p,
)

IDS = torch.zeros(1, 1, dtype=torch.long)  # the warpers of transformers ignore the token ids


def test_generator_is_splitmix64() -> None:
    # The first outputs for seed 1234567, from the reference implementation in C (Vigna, 2015).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    state = torch.arange(1, 5) * _GAMMA + 1234567
    assert [value % 2**64 for value in _mix(state).tolist()] == expected


def test_noise_depends_on_key_and_counter_alone() -> None:
    keys = _mix(torch.arange(5)).unsqueeze(-1)
    whole = gumbel_noise(keys, torch.arange(1000))
    picked = torch.tensor([999, 3, 512])
    assert torch.equal(gumbel_noise(keys[2:3], picked), whole[2:3, picked])
    assert torch.equal(gumbel_noise(keys[2, 0].expand(3), picked), whole[2, picked])
    assert whole.unique().numel() == whole.numel()


def test_noise_follows_the_gumbel_distribution() -> None:
    noise = gumbel_noise(_mix(torch.tensor([42])), torch.arange(200_000))
    assert noise.isfinite().all()
    # Kolmogorov-Smirnov: the largest gap to the distribution function; 1.95 / sqrt(n) has p = 0.001.
    expected = torch.exp(-torch.exp(-noise.sort().values))
    steps = torch.arange(1, 200_001) / 200_000
    assert float((expected - steps).abs().max()) < 1.95 / 200_000**0.5


def test_noise_is_finite_where_the_generator_gives_all_zeros_or_all_ones() -> None:
    extremes = torch.tensor([0, -1])
    keys = torch.stack([_unmix(value) - _GAMMA for value in extremes])
    assert torch.equal(_mix(keys + _GAMMA), extremes)
    low, high = gumbel_noise(keys, torch.zeros(2, dtype=torch.long)).tolist()
    assert -3.7 < low < -3.5  # -log(53 log 2)
    assert 36.0 < high < 37.0  # 53 log 2


def _unmix(z: torch.Tensor) -> torch.Tensor:
    """The inverse of the finaliser, which is a bijection."""
    value = int(z) % 2**64
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        shifted = value
        for _ in range(64 // shift + 1):
            shifted = value ^ (shifted >> shift)
        value = shifted * pow(factor, -1, 2**64) % 2**64
    return torch.tensor(value - 2**64 if value >= 2**63 else value)


@pytest.mark.parametrize("vocab", [3, 50, 2000])
def test_filters_equal_those_of_transformers(vocab: int) -> None:
    scores = torch.randn(6, vocab) * 3
    for k in (1, 2, 40, 5000):
        expected = TopKLogitsWarper(k)(IDS, scores.clone())
        assert torch.equal(keep_top_k(scores, torch.full((6,), k)), expected)
    for p in (0.01, 0.5, 0.9, 0.999):
        expected = TopPLogitsWarper(p)(IDS, scores.clone())
        assert torch.equal(keep_top_p(scores, torch.full((6,), p, dtype=torch.float64)), expected)
    for p in (0.01, 0.2, 0.9):
        expected = MinPLogitsWarper(p)(IDS, scores.clone())
        assert torch.equal(keep_min_p(scores, torch.full((6,), p, dtype=torch.float64)), expected)


def test_filters_treat_each_row_by_its_own_limit() -> None:
    scores = torch.randn(4, 3000)
    k = torch.tensor([1, 7, 3000, 9999])
    p = torch.tensor([0.1, 0.5, 0.99, 1.0], dtype=torch.float64)
    for keep, limit in ((keep_top_k, k), (keep_top_p, p), (keep_min_p, p)):
        together = keep(scores, limit)
        for row in range(4):
            alone = keep(scores[row : row + 1], limit[row : row + 1])
            assert torch.equal(together[row], alone[0])


def test_top_p_over_a_flat_distribution_looks_beyond_its_first_tokens() -> None:
    kept = keep_top_p(torch.randn(1, 20_000) * 1e-3, torch.tensor([0.75], dtype=torch.float64))
    assert abs(int(kept.isfinite().sum()) - 15_000) < 50


def test_equal_scores_are_kept_or_dropped_together() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    assert keep_top_k(scores, torch.tensor([2])).isfinite().tolist() == [[True, True, True, True, False]]
    half = torch.tensor([0.5], dtype=torch.float64)
    assert keep_top_p(scores, half).isfinite().tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("kept", [1, 3, 90, 100])
def test_argmax_samples_from_the_softmax_of_what_is_kept(kept: int) -> None:
    """With few tokens kept the noise is computed for these only; with many for all."""
    draws, vocab = 40_000, 100
    scores = (torch.randn(1, vocab) * 2).index_fill(1, torch.randperm(vocab)[kept:], -torch.inf)
    seeds = torch.arange(draws)
    tokens = gumbel_argmax(scores.expand(draws, -1), seeds, seeds % 3, torch.full_like(seeds, 5))
    counts = tokens.bincount(minlength=vocab).double()
    expected = scores[0].double().softmax(0) * draws
    assert int(counts[expected == 0].sum()) == 0
    common = expected > 5
    excess = float(((counts - expected).square() / expected)[common].sum())
    freedom = max(1, int(common.sum()) - 1)
    # Chi-square has mean f and standard deviation sqrt(2 f); eight of these have p < 0.001 for any f.
    assert excess < freedom + 8 * (2 * freedom) ** 0.5


def test_sparse_and_dense_noise_choose_the_same_token() -> None:
    dense = torch.randn(64, 40)
    sparse = torch.full((64, 40 * 20), -torch.inf)
    sparse[:, :40] = dense
    keys = torch.arange(64) * 7919, torch.arange(64) % 3, torch.arange(64) % 5
    assert torch.equal(gumbel_argmax(dense, *keys), gumbel_argmax(sparse, *keys))


def test_the_first_choice_has_the_noise_of_the_seed_itself() -> None:
    """SplitMix64's second output for the seed: streams that began without choices go on the same."""
    scores, seed, index = torch.zeros(1, 5000), torch.tensor([77]), torch.tensor([4])
    expected = gumbel_noise(_mix(_mix(seed) + index * _GAMMA), torch.arange(5000)).argmax()
    assert gumbel_argmax(scores, seed, torch.tensor([0]), index) == expected


def test_choices_are_drawn_independently() -> None:
    """The pairs that two choices of one seed give fill the square as pairs of independent draws do."""
    draws, vocab = 40_000, 8
    scores, seeds, zeros = (
        torch.zeros(draws, vocab),
        torch.arange(draws),
        torch.zeros(draws, dtype=torch.long),
    )
    for other in (1, 2, 100):
        pair = [gumbel_argmax(scores, seeds, zeros + choice, zeros) for choice in (0, other)]
        counts = (pair[0] * vocab + pair[1]).bincount(minlength=vocab**2).double()
        expected = draws / vocab**2
        excess = float((counts - expected).square().sum() / expected)
        assert excess < 63 + 8 * (2 * 63) ** 0.5
