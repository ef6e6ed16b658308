"""Choosing tokens from scores with noise that depends on nothing but (seed, choice, output index, token id).

    token = argmax over t of score[t] + g[t]          g[t] = -log(-log(u[t])),   0 < u[t] < 1

which draws t with probability softmax(score)[t] (the Gumbel-max trick; Maddison et al., "A* Sampling",
2014). u comes from a counter-based generator, SplitMix64 (Steele, Lea and Flood, "Fast Splittable
Pseudorandom Number Generators", 2014), keyed by seed, choice and index and counted by token id:

    key = mix(mix(seed + choice * gamma) + index * gamma)          u[t] from mix(key + (t + 1) * gamma)

The same logits therefore give the same token in any batch and on any worker.

The filters keep a token by comparing its value with a threshold, never by its rank, so equal scores
are kept or dropped together and the order in which a device sorts them has no effect.
"""

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio's fraction, odd, as a signed 64-bit number
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64

# How many of the largest probabilities `keep_top_p` looks at before it sorts the whole vocabulary.
_TOP_P_FIRST_LOOK = 512
# With fewer than one token in this many left, noise is computed for those left only.
_SPARSE = 8


def keep_top_k(scores: Tensor, k: Tensor) -> Tensor:
    """-inf for all but the k[r] largest scores of row r (more if the last are equal).

    scores: [rows, vocab]; k: int64 [rows], at least 1.
    """
    k = k.clamp(max=scores.shape[-1])
    largest = scores.topk(int(k.max()), dim=-1).values
    return _keep_from(scores, scores, largest.gather(-1, (k - 1).unsqueeze(-1)))


def keep_top_p(scores: Tensor, p: Tensor) -> Tensor:
    """-inf for all but the smallest set of largest scores whose probabilities sum to p[r] or more.

    scores: [rows, vocab]; p: float64 [rows], in (0, 1]. Keeps at least one token.
    """
    probabilities = scores.softmax(dim=-1)
    look = min(_TOP_P_FIRST_LOOK, scores.shape[-1])
    threshold, reached = _mass_threshold(probabilities.topk(look, dim=-1).values, p)
    if not bool(reached.all()):
        threshold, _ = _mass_threshold(probabilities.sort(dim=-1, descending=True).values, p)
    return _keep_from(scores, probabilities, threshold)


def _mass_threshold(descending: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The probability at which the sum reaches p, and whether it does so: both [rows, 1]."""
    short = descending.double().cumsum(dim=-1) < p.unsqueeze(-1)
    rank = short.sum(dim=-1, keepdim=True)
    reached = rank < descending.shape[-1]
    return descending.gather(-1, rank.clamp(max=descending.shape[-1] - 1)), reached


def keep_min_p(scores: Tensor, p: Tensor) -> Tensor:
    """-inf for tokens less than p[r] times as probable as the most probable one of row r.

    scores: [rows, vocab]; p: float64 [rows], in (0, 1].
    """
    threshold = scores.amax(dim=-1, keepdim=True) + p.log().unsqueeze(-1).to(scores.dtype)
    return _keep_from(scores, scores, threshold)


def _keep_from(scores: Tensor, values: Tensor, threshold: Tensor) -> Tensor:
    return scores.masked_fill(values < threshold, -torch.inf)


def gumbel_argmax(scores: Tensor, seeds: Tensor, choices: Tensor, indices: Tensor) -> Tensor:
    """int64 [rows]: the sampled token ids. scores: [rows, vocab]; seeds, choices, indices: int64 [rows]."""
    keys = _mix(_mix(seeds + choices * _GAMMA) + indices * _GAMMA).unsqueeze(-1)
    kept = scores > -torch.inf
    if int(kept.sum()) * _SPARSE > kept.numel():
        ids = torch.arange(scores.shape[-1], device=scores.device)
        return (scores + gumbel_noise(keys, ids)).argmax(dim=-1)
    rows, ids = kept.nonzero(as_tuple=True)
    noisy = torch.full(scores.shape, -torch.inf, dtype=torch.float64, device=scores.device)
    noisy[rows, ids] = scores[rows, ids] + gumbel_noise(keys[rows, 0], ids)
    return noisy.argmax(dim=-1)


def gumbel_noise(keys: Tensor, counters: Tensor) -> Tensor:
    """float64 Gumbel noise for int64 keys and counters that broadcast against each other.

    Finite: u is an odd multiple of 2^-53, so it is never 0 or 1.
    """
    bits = _mix((counters + 1) * _GAMMA + keys)
    uniform = (_shift_right(bits, 11) | 1).double().mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_()


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser. Signed products wrap as unsigned ones do."""
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's is arithmetic, so the copies of the sign bit are cleared."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
