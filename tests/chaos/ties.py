"""Whether two answers to one request part at a tie: where rounding decides, not what was computed.

In float32 the order of sums depends on what else is in a step, so two tokens whose scores, noise
included, are within TIE of each other may come out either way. An independent implementation of the
model computes the scores at the first difference; the sampler then shows which tokens are that near.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from services.engine.device.sampler import sample_tokens
from services.engine.runner import Sample
from services.gateway.api.schema import ChatCompletionRequest, CompletionRequest
from services.gateway.path.generation import Generation
from services.gateway.served_model import ServedModel
from services.gateway.text.prompt import PromptReader
from services.model.files import open_model
from tests.chaos.workload import Ask
from tests.support.reference import TIE, Reference

NextLogits = Callable[[Sequence[int]], Tensor]  # of the token after these, as Reference.next_logits


class TieJudge:
    """`next_logits` is the independent implementation's: loaded when answers differ, if not given."""

    def __init__(self, gguf: Path, next_logits: NextLogits | None = None) -> None:
        self._gguf = gguf
        self._next_logits = next_logits

    async def parts_at_tie(self, ask: Ask, choice: int, one: list[int], other: list[int]) -> bool:
        """Whether two different answers for one choice, as token ids, are both right."""
        at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if at is None:  # one goes on where the other ends: no rounding does that
            return False
        if self._next_logits is None:
            self._next_logits = Reference(self._gguf).next_logits
        generation = await self._read(ask)
        logits = self._next_logits([*generation.prompt_ids, *one[:at]]).clone()
        sample = Sample(generation.sampling, generation.prompt_ids, one[:at], choice)
        best = sample_tokens(logits[None], [sample])[0]
        logits[best] -= TIE * (generation.sampling.temperature or 1.0)
        second = sample_tokens(logits[None], [sample])[0]
        return {one[at], other[at]} == {best, second}

    async def _read(self, ask: Ask) -> Generation:
        """The request as the gateway reads it."""
        kind = ChatCompletionRequest if "messages" in ask.body else CompletionRequest
        model = ServedModel.of(open_model(self._gguf))
        reader = PromptReader(model, lambda: 1 << 20, choices_max=ask.choices, rng=random.Random(0))
        return await reader.read_one(kind.model_validate(ask.body), "judged", deadline=0.0)
