"""Sampling: a pure function of (logits, SamplingParams, choice, output index, token histories).

    penalties -> the request's rules (logit_rules.py) -> forbidden ends -> grammar (grammar.py)
        -> temperature -> top_k -> top_p -> min_p -> Gumbel argmax

Nothing in it depends on the other rows of the batch, nor on the worker.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import ops
from kernels.cpu.kernels import CpuKernels
from kernels.cpu.library import DRAW
from services.engine.device.logit_rules import RuleCache, has_rules
from services.engine.runner import Sample

# Rows that are sampled together. On a CPU a row's float64 noise (8 bytes per token of the vocabulary)
# should stay in the cache between the ops that compute it; a GPU wants all rows in one launch.
_ROWS_AT_ONCE_CPU = 2
_ROWS_AT_ONCE_GPU = 256


_rules = RuleCache()

# Chooses each row's token from float32 [rows, vocab] after penalties.
Choose = Callable[[Tensor, Sequence[Sample]], list[int]]


def choose_with_torch(logits: Tensor, samples: Sequence[Sample]) -> list[int]:
    tokens = [0] * len(samples)
    greedy = [row for row, sample in enumerate(samples) if sample.params.temperature == 0]
    drawn = [row for row, sample in enumerate(samples) if sample.params.temperature != 0]
    if greedy:
        chosen = logits.argmax(dim=-1) if not drawn else logits[greedy].argmax(dim=-1)
        _store(tokens, greedy, chosen)
    at_once = _ROWS_AT_ONCE_CPU if logits.device.type == "cpu" else _ROWS_AT_ONCE_GPU
    for start in range(0, len(drawn), at_once):
        rows = drawn[start : start + at_once]
        _store(tokens, rows, _draw(logits[rows], [samples[row] for row in rows]))
    return tokens


def choose_with_kernels(kernels: CpuKernels) -> Choose:
    """The same tokens from the C++ kernels; logits on a CPU."""

    def choose(logits: Tensor, samples: Sequence[Sample]) -> list[int]:
        draws = np.empty(len(samples), dtype=DRAW)
        params = [sample.params for sample in samples]
        draws["seed"] = [_signed(p.seed) for p in params]
        draws["choice"] = [sample.choice for sample in samples]
        draws["index"] = [len(sample.output_ids) for sample in samples]
        draws["temperature"] = [p.temperature for p in params]
        draws["top_k"] = [min(p.top_k, logits.shape[1]) for p in params]
        draws["top_p"] = [p.top_p for p in params]
        draws["min_p"] = [p.min_p for p in params]
        return kernels.sample(logits, draws)

    return choose


def sample_tokens(
    logits: Tensor,
    samples: Sequence[Sample],
    choose: Choose = choose_with_torch,
    restrict: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> list[int]:
    """The next token of each row. logits: float32 [rows, vocab], left as they are; `restrict` changes them
    last."""
    return choose(restrict(_adjust(logits, samples)), samples)


def _store(tokens: list[int], rows: list[int], chosen: Tensor) -> None:
    for row, token in zip(rows, chosen.tolist(), strict=True):
        tokens[row] = token


def _adjust(logits: Tensor, samples: Sequence[Sample]) -> Tensor:
    """The logits after penalties, rules and min_tokens; the same tensor if no row has any."""
    changed = [
        row
        for row, sample in enumerate(samples)
        if _penalized(sample) or has_rules(sample.params) or _must_go_on(sample)
    ]
    if not changed:
        return logits
    logits = logits.clone()
    for row in changed:
        logits[row] = _adjust_row(logits[row], samples[row])
    return logits


def _penalized(sample: Sample) -> bool:
    p = sample.params
    return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0


def _must_go_on(sample: Sample) -> bool:
    """Whether the token to be sampled could not end the answer; see SamplingParams.finish."""
    return len(sample.output_ids) + 1 < sample.params.min_tokens and bool(sample.params.end_token_ids)


def _adjust_row(logits: Tensor, sample: Sample) -> Tensor:
    p, output = sample.params, list(sample.output_ids)

    def ids(tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=logits.device)

    if p.repetition_penalty != 1.0:
        logits = ops.penalize_repetition(logits, ids([*sample.prompt_ids, *output]), p.repetition_penalty)
    if output and (p.presence_penalty != 0.0 or p.frequency_penalty != 0.0):
        logits = ops.penalize_output(logits, ids(output), p.frequency_penalty, p.presence_penalty)
    if has_rules(p):
        logits = _rules.of(p, logits).apply(logits, output)
    if _must_go_on(sample):
        # A client may name stop ids that this model's vocabulary lacks.
        logits = ops.forbid(logits, ids([token for token in p.end_token_ids if token < len(logits)]))
    return logits


def _draw(logits: Tensor, samples: Sequence[Sample]) -> Tensor:
    params = [sample.params for sample in samples]

    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)

    # Relative to the best token, so that no temperature however small can overflow.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / column(
        [p.temperature for p in params], logits.dtype
    ).unsqueeze(-1)
    scores = _filter(scores, [p.top_k for p in params], 0, torch.int64, ops.keep_top_k)
    scores = _filter(scores, [p.top_p for p in params], 1.0, torch.float64, ops.keep_top_p)
    scores = _filter(scores, [p.min_p for p in params], 0.0, torch.float64, ops.keep_min_p)
    return ops.gumbel_argmax(
        scores,
        column([_signed(p.seed) for p in params], torch.int64),
        column([sample.choice for sample in samples], torch.int64),
        column([len(sample.output_ids) for sample in samples], torch.int64),
    )


def _filter(
    scores: Tensor,
    limits: list[float],
    off: float,
    dtype: torch.dtype,
    keep: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`keep` on the rows whose limit is not `off`."""
    rows = [row for row, limit in enumerate(limits) if limit != off]
    if not rows:
        return scores
    limit = torch.tensor([limits[row] for row in rows], dtype=dtype, device=scores.device)
    if len(rows) == len(scores):
        return keep(scores, limit)
    return scores.index_copy(0, torch.tensor(rows, device=scores.device), keep(scores[rows], limit))


def _signed(seed: int) -> int:
    """Any integer as the signed 64-bit number with the same low bits."""
    return (seed + 2**63) % 2**64 - 2**63
