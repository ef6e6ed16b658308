"""How long a worker's step takes: one linear model, fitted by each worker to its own steps.

    step ms = step + token * T + token_context * X + sequence * S + context * C

    T  prompt tokens computed in the step        S  decoding sequences
    X  the tokens before each of them, summed    C  the sequences' lengths, summed

Weights are read once a step, whatever it computes (step); linear layers work token by token (token,
sequence); attention reads the keys and values of all tokens before (token_context, context).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean


def context_of(tokens: int, start: int) -> int:
    """X of `tokens` prompt tokens with `start` tokens before the first: of n, n * start + n (n - 1) / 2."""
    return tokens * start + tokens * (tokens - 1) // 2


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes: T, X, S and C of the model."""

    tokens: int = 0
    token_context: int = 0
    sequences: int = 0
    context: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """Coefficients in milliseconds, none negative.

    Both coefficients of prompts, or both of decoding, are zero when no step of the kind was measured;
    `completed` takes them from others.
    """

    step: float = 0.0
    token: float = 0.0
    token_context: float = 0.0
    sequence: float = 0.0
    context: float = 0.0

    @property
    def knows_prefill(self) -> bool:
        return self.token > 0 or self.token_context > 0

    @property
    def knows_decode(self) -> bool:
        return self.sequence > 0 or self.context > 0

    def step_ms(self, work: StepWork) -> float:
        prefill_ms = self.tokens_ms(work.tokens, work.token_context)
        return self.step + prefill_ms + self.sequence * work.sequences + self.context * work.context

    def tokens_ms(self, tokens: int, token_context: int) -> float:
        """What prompt tokens add to the steps that compute them."""
        return self.token * tokens + self.token_context * token_context

    def queue_ms(self, tokens: int, token_context: int, chunk_tokens: int) -> float:
        """Many prompts' tokens, computed by one full step of `chunk_tokens` tokens after another (0: as
        many as there are). Where all steps are full, a fit cannot tell a step's time from its tokens'."""
        steps = tokens / chunk_tokens if chunk_tokens else float(tokens > 0)
        return self.step * steps + self.tokens_ms(tokens, token_context)

    def prefill_ms(self, tokens: int, start: int = 0, chunk_tokens: int = 0) -> float:
        """One prompt's `tokens` tokens, with `start` tokens before the first, in steps of `chunk_tokens`."""
        steps = -(-tokens // chunk_tokens) if chunk_tokens else 1
        return self.step * steps + self.tokens_ms(tokens, context_of(tokens, start))

    def decode_ms(self, sequences: int, context: int) -> float:
        """A step in which `sequences` sequences of together `context` tokens only decode."""
        return self.step + self.sequence * sequences + self.context * context

    def tokens_within(self, ms: float, start: int) -> int:
        """The most prompt tokens, with `start` tokens before the first, that add at most `ms` to a step.

        They add a n + b n^2 / 2, with a = token + token_context * (start - 1/2) and b = token_context.
        """
        assert self.knows_prefill
        if ms <= 0:
            return 0
        a = self.token + self.token_context * max(start - 0.5, 0.0)
        return int(2 * ms / (a + math.sqrt(a * a + 2 * self.token_context * ms)))

    def completed(self, typical: "StepModel") -> "StepModel":
        """This one, with what it does not know from `typical`."""
        model = self
        if not model.knows_prefill:
            model = replace(model, token=typical.token, token_context=typical.token_context)
        if not model.knows_decode:
            model = replace(model, sequence=typical.sequence, context=typical.context)
        return model


def average(models: Sequence[StepModel], assumed: StepModel) -> StepModel:
    """What is typical of `models`: each coefficient's mean over those that know it, or else the assumed."""
    prefilling = [model for model in models if model.knows_prefill] or [assumed]
    decoding = [model for model in models if model.knows_decode] or [assumed]
    return StepModel(
        step=fmean(model.step for model in models or [assumed]),
        token=fmean(model.token for model in prefilling),
        token_context=fmean(model.token_context for model in prefilling),
        sequence=fmean(model.sequence for model in decoding),
        context=fmean(model.context for model in decoding),
    )
