"""What a request's own rules do to the logits: bias, the tokens it allows, the words it does not want.

    x[t] + bias[t]            then -inf for t that are not allowed, and for t that would complete a bad word

A bad word is a sequence of tokens: its last one is forbidden while the answer ends with those before it.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import ops
from services.core.sampling import SamplingParams

_CACHED = 256  # requests whose rules are ready: with 49,152 tokens 49 kB each at most


class LogitRules:
    """The rules of one request, as tensors. Its token ids are in the vocabulary."""

    def __init__(self, params: SamplingParams, vocab: int, device: torch.device) -> None:
        self._device = device
        self._biased = self._ids(list(params.logit_bias))
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        self._forbidden: Tensor | None = None
        if params.allowed_token_ids:
            self._forbidden = torch.ones(vocab, dtype=torch.bool, device=device)
            self._forbidden[self._ids(list(params.allowed_token_ids))] = False
        self._bad_tokens: set[int] = set()
        self._bad_words: dict[int, list[tuple[int, ...]]] = {}  # longer ones, by their last token but one
        for word in params.bad_words:
            if len(word) == 1:
                self._bad_tokens.add(word[0])
            else:
                self._bad_words.setdefault(word[-2], []).append(word)

    def apply(self, logits: Tensor, output: Sequence[int]) -> Tensor:
        """logits: float32 [vocab]; `output` is the answer so far."""
        if len(self._bias):
            logits = ops.add_bias(logits, self._biased, self._bias)
        if self._forbidden is not None:
            logits = logits.masked_fill(self._forbidden, -torch.inf)
        if bad := self._bad_tokens | self._completing(output):
            logits = ops.forbid(logits, self._ids(list(bad)))
        return logits

    def _completing(self, output: Sequence[int]) -> set[int]:
        """The tokens that would complete a bad word."""
        words = self._bad_words.get(output[-1], []) if output else []
        return {word[-1] for word in words if tuple(output[len(output) - len(word) + 1 :]) == word[:-1]}

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self._device)


class RuleCache:
    """The rules of the requests that were sampled last: a request keeps its SamplingParams from step to
    step."""

    def __init__(self) -> None:
        self._rules: OrderedDict[int, tuple[SamplingParams, LogitRules]] = OrderedDict()

    def of(self, params: SamplingParams, logits: Tensor) -> LogitRules:
        """For rows of `logits`, float32 [.., vocab]."""
        known, rules = self._rules.pop(id(params), (None, None))
        if known is not params or rules is None:
            rules = LogitRules(params, logits.shape[-1], logits.device)
        self._rules[id(params)] = (params, rules)  # holds params, so that nobody else gets its id
        if len(self._rules) > _CACHED:
            self._rules.popitem(last=False)
        return rules


def has_rules(params: SamplingParams) -> bool:
    return bool(params.logit_bias or params.allowed_token_ids or params.bad_words)
