"""From a Sequence message of the wire to a Submit for the engine. What passes here cannot break a step."""

import math
from dataclasses import dataclass
from itertools import chain

from services.core.errors import BadRequest
from services.core.logprobs import TOP_LOGPROBS_MAX
from services.core.sampling import SamplingParams
from services.engine.messages import Kind, Submit
from services.wire.convert import attempt_id, choices_from_wire, sampling_from_wire
from services.wire.generated import worker_pb2

CHOICES_MAX = 128  # of one sequence: as many as OpenAI's `n` allows


@dataclass(frozen=True, slots=True)
class SequenceBounds:
    vocab_size: int
    context_tokens_max: int  # prompt + answer

    def submission(self, sequence: worker_pb2.Sequence, kind: Kind) -> Submit:
        """Raises BadRequest for token ids outside the vocabulary or more tokens than fit."""
        submit = Submit(
            seq_id=attempt_id(sequence.request_id, sequence.attempt),
            kind=kind,
            prompt_ids=list(sequence.prompt_ids),
            output_ids=list(sequence.output_ids),
            sampling=sampling_from_wire(sequence.sampling),
            salt=sequence.salt,
            choices=choices_from_wire(sequence),
            fetch_tokens=sequence.prefix.tokens if kind != "receive" else 0,
        )
        self._check(submit)
        return submit

    def _check(self, submit: Submit) -> None:
        self._check_rules(submit.sampling)
        if len(submit.choices) > CHOICES_MAX or len(set(submit.choices)) < len(submit.choices):
            raise BadRequest(f"choice_ids must be at most {CHOICES_MAX} different numbers", "choice_ids")
        tokens = submit.prompt_ids + submit.output_ids
        if not submit.prompt_ids:
            raise BadRequest("prompt_ids is empty", "prompt_ids")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise BadRequest(f"token ids must be in 0..{self.vocab_size - 1}", "prompt_ids")
        if len(submit.output_ids) >= submit.sampling.max_tokens:
            raise BadRequest("output_ids already has max_tokens tokens", "output_ids")
        needed = len(submit.prompt_ids) + submit.sampling.max_tokens
        if needed > self.context_tokens_max:
            raise BadRequest(f"{needed} tokens exceed the worker's {self.context_tokens_max}", "max_tokens")

    def _check_rules(self, sampling: SamplingParams) -> None:
        if max(sampling.top_logprobs or 0, sampling.prompt_logprobs or 0) > TOP_LOGPROBS_MAX:
            raise BadRequest(f"at most {TOP_LOGPROBS_MAX} logprobs for each token", "top_logprobs")
        if not all(map(math.isfinite, sampling.logit_bias.values())):
            raise BadRequest("a bias must be a finite number", "logit_bias")
        if not all(sampling.bad_words):
            raise BadRequest("a bad word is empty", "bad_words")
        named = [*sampling.logit_bias, *sampling.allowed_token_ids, *chain.from_iterable(sampling.bad_words)]
        if named and (min(named) < 0 or max(named) >= self.vocab_size):
            raise BadRequest(f"token ids must be in 0..{self.vocab_size - 1}", "sampling")
