"""What a request asks of sampling, and why an answer ended."""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Validated by the gateway; workers trust it. Greedy when `temperature` is 0."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    # EOS (unless ignored) and the client's stop ids. The token that ends an answer is part of its count.
    end_token_ids: tuple[int, ...] = ()
    grammar: str = ""  # what the answer must match, in llguidance's terms; empty: anything
    # None: no logprobs; 0: of the token itself; above: of so many most probable ones as well.
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None  # the same for the prompt's tokens; all of them are computed then
    logit_bias: dict[int, float] = {}  # added to the logits of these tokens
    allowed_token_ids: tuple[int, ...] = ()  # empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that the answer must not contain

    def finish(self, token: int, output_tokens: int) -> FinishReason | None:
        """Why the answer ends with `token` as its `output_tokens`-th token, or None if it goes on."""
        if token in self.end_token_ids and output_tokens >= self.min_tokens:
            return "stop"
        return "length" if output_tokens >= self.max_tokens else None
