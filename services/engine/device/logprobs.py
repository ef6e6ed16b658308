"""Logprobs of tokens: log-softmax of a row's logits in float64, given as float32.

    logprob[t] = x[t] - log(sum over u of exp(x[u]))        rank[t] = 1 + the number of u with x[u] > x[t]

A row's numbers depend on nothing but the row: torch computes each by itself, in one order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.engine.runner import Sample, Targets

# In float64 a row of the default model's logits has 393 kB: so many stay in a processor's cache.
_ROWS_AT_ONCE = 16
_LEAST = -9999.0  # what OpenAI gives for the least probable


class Scores(NamedTuple):
    logprobs: Tensor  # float32 [rows]
    ranks: Tensor  # int32 [rows]
    top_ids: Tensor  # int32 [rows, top], best first
    top_logprobs: Tensor  # float32 [rows, top]


def score(logits: Tensor, tokens: Sequence[int], top: int) -> Scores:
    """Of each row's token. logits: float32 [rows, vocab]."""
    targets = torch.tensor(tokens, dtype=torch.int64, device=logits.device).unsqueeze(-1)
    top = min(top, logits.shape[1])
    pieces = [slice(at, at + _ROWS_AT_ONCE) for at in range(0, len(logits), _ROWS_AT_ONCE)]
    scored = [_score(logits[piece], targets[piece], top) for piece in pieces]
    return Scores(*(torch.cat(column) for column in zip(*scored, strict=True)))


def _score(logits: Tensor, targets: Tensor, top: int) -> Scores:
    values = logits.double().log_softmax(dim=-1)
    best = logits.topk(top, dim=-1).indices
    above = logits > logits.gather(-1, targets)
    return Scores(
        _finite(values.gather(-1, targets).squeeze(-1)),
        above.sum(dim=-1, dtype=torch.int32) + 1,
        best.int(),
        _finite(values.gather(-1, best)),
    )


def _finite(logprobs: Tensor) -> Tensor:
    """JSON has no other numbers; a model that overflows has others."""
    return logprobs.float().nan_to_num(_LEAST, neginf=_LEAST)


def sampled_logprobs(
    logits: Tensor, tokens: Sequence[int], samples: Sequence[Sample]
) -> list[TokenLogprobs | None]:
    """Of the tokens that were sampled from the rows of `logits`, for those that ask for them."""
    result: list[TokenLogprobs | None] = [None] * len(samples)
    asked = {row: top for row, s in enumerate(samples) if (top := s.params.top_logprobs) is not None}
    if asked:
        rows = list(asked)
        scores = score(logits[rows], [tokens[row] for row in rows], max(asked.values()))
        columns = zip(*(column.tolist() for column in scores), strict=True)
        for (row, top), (logprob, rank, ids, values) in zip(asked.items(), columns, strict=True):
            result[row] = TokenLogprobs(logprob, rank, tuple(ids[:top]), tuple(values[:top]))
    return result


def prompt_logprobs(targets: Targets, parts: Sequence[Scores]) -> PromptLogprobs:
    """All parts of a row's targets, in order, as they travel."""
    joined = Scores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))
    return PromptLogprobs(
        targets.first, joined.top_ids.shape[1], *(column.numpy().tobytes() for column in joined)
    )
