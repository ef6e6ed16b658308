"""From a Sequence message of the wire to a Submit for the engine. What passes here cannot break a step, nor
fill a worker's memory: every field has a bound."""

import math
from dataclasses import dataclass
from itertools import chain

from services.core.errors import BadRequest
from services.core.logprobs import TOP_LOGPROBS_MAX
from services.core.sampling import SamplingParams
from services.engine.messages import Kind, Submit
from services.wire.convert import attempt_id, check_name, choices_from_wire, sampling_from_wire
from services.wire.generated import worker_pb2

CHOICES_MAX = 128  # of one sequence: as many as OpenAI's `n` allows
CHOICE_IDS_MAX = 1 << 20  # numbers of choices are below
TEXT_BYTES_MAX = 1 << 20  # of a grammar
END_TOKENS_MAX, BAD_WORDS_MAX = 2048, 1024  # they are compared one by one in every step
_PENALTY_MAX = 1e4  # float32 holds any logit with so many of it


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
        check_name(sequence.request_id, "request_id")
        check_name(sequence.salt or "-", "salt")
        self._check(submit)
        return submit

    def _check(self, submit: Submit) -> None:
        self._check_rules(submit.sampling)
        self._check_numbers(submit.sampling)
        choices = submit.choices
        if len(choices) > CHOICES_MAX or len(set(choices)) < len(choices) or max(choices) >= CHOICE_IDS_MAX:
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

    def _check_numbers(self, sampling: SamplingParams) -> None:
        limits = {
            "temperature": (0.0, 1e6),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "presence_penalty": (-_PENALTY_MAX, _PENALTY_MAX),
            "frequency_penalty": (-_PENALTY_MAX, _PENALTY_MAX),
            "repetition_penalty": (0.0, math.inf),
        }
        for name, (least, most) in limits.items():
            value = getattr(sampling, name)
            if not (math.isfinite(value) and least <= value <= most):
                raise BadRequest(f"{name} must be a number from {least:g} to {most:g}, not {value}", name)
        if sampling.repetition_penalty == 0.0:
            raise BadRequest("repetition_penalty must be above 0", "repetition_penalty")
        if len(sampling.end_token_ids) > END_TOKENS_MAX or min(sampling.end_token_ids, default=0) < 0:
            raise BadRequest(f"end_token_ids must be at most {END_TOKENS_MAX} tokens", "end_token_ids")
        if len(sampling.grammar) > TEXT_BYTES_MAX:
            raise BadRequest(f"a grammar has at most {TEXT_BYTES_MAX} characters", "grammar")

    def _check_rules(self, sampling: SamplingParams) -> None:
        if max(sampling.top_logprobs or 0, sampling.prompt_logprobs or 0) > TOP_LOGPROBS_MAX:
            raise BadRequest(f"at most {TOP_LOGPROBS_MAX} logprobs for each token", "top_logprobs")
        if not all(abs(bias) <= _PENALTY_MAX for bias in sampling.logit_bias.values()):
            raise BadRequest(f"a bias must be a number up to {_PENALTY_MAX:g}", "logit_bias")
        if not all(sampling.bad_words) or len(sampling.bad_words) > BAD_WORDS_MAX:
            raise BadRequest(f"bad_words must be at most {BAD_WORDS_MAX}, none of them empty", "bad_words")
        named = [*sampling.logit_bias, *sampling.allowed_token_ids, *chain.from_iterable(sampling.bad_words)]
        if named and (min(named) < 0 or max(named) >= self.vocab_size):
            raise BadRequest(f"token ids must be in 0..{self.vocab_size - 1}", "sampling")
