"""The independent reference: transformers' implementation of the same model, from the same file.

A greedy answer is right when every token is the likeliest one, given the prompt and the tokens
before it. One forward pass over prompt and answer checks them all. Floating-point sums depend on the
order of their terms, so where two tokens are nearly equally likely either may come out: a token
whose logit is within TIE of the largest one is right too, and counted as a tie.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

TIE = 1e-3  # in logits; float32 sums of this model differ by about 1e-4 between two orders


class Reference:
    def __init__(self, gguf: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        ).eval()
        self._checked: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}

    def check_greedy(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> int:
        """How many tokens are ties. Fails at a token that is neither the likeliest nor a tie.

        An answer that was checked before is not computed again.
        """
        key = (tuple(prompt_ids), tuple(output_ids))
        if key not in self._checked:
            self._checked[key] = self._count_ties(*key)
        return self._checked[key]

    @torch.inference_mode()
    def next_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float32 [vocab]: the scores of what may follow `token_ids`."""
        return self._model(torch.tensor([list(token_ids)]), logits_to_keep=1, use_cache=False).logits[0, 0]

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """float64 [tokens - 1, vocab]: log-softmax of what may follow each token but the last."""
        logits = self._model(torch.tensor([list(token_ids[:-1])]), use_cache=False).logits[0]
        return logits.double().log_softmax(dim=-1)

    @torch.inference_mode()
    def _count_ties(self, prompt_ids: tuple[int, ...], output_ids: tuple[int, ...]) -> int:
        known = torch.tensor([[*prompt_ids, *output_ids[:-1]]])
        logits = self._model(known, logits_to_keep=len(output_ids), use_cache=False).logits[0]
        chosen = logits.gather(1, torch.tensor(output_ids)[:, None])[:, 0]
        behind = logits.max(dim=1).values - chosen
        wrong = (behind > TIE).nonzero()[:, 0].tolist()
        assert not wrong, (
            f"after a prompt of {len(prompt_ids)} tokens, token {wrong[0]} of the answer is "
            f"{output_ids[wrong[0]]}, whose logit is {behind[wrong[0]]:.4f} below the largest"
        )
        return int((behind > 0).sum())
