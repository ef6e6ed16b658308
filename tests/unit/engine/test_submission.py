"""What a peer sends is refused where it could break a step."""

from typing import Any

import pytest

from services.core.errors import BadRequest
from services.core.sampling import SamplingParams
from services.engine.submission import SequenceBounds
from services.wire.convert import sampling_to_wire
from services.wire.generated import worker_pb2

BOUNDS = SequenceBounds(vocab_size=100, context_tokens_max=50)


def sequence(**params: Any) -> worker_pb2.Sequence:
    sampling = sampling_to_wire(SamplingParams(max_tokens=5, **params))
    return worker_pb2.Sequence(request_id="r", prompt_ids=[1, 2], sampling=sampling)


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {100: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: float("inf")}},
        {"allowed_token_ids": (1, 100)},
        {"allowed_token_ids": (-1,)},
        {"bad_words": ((1, 100),)},
        {"bad_words": ((),)},
        {"top_logprobs": 21},
        {"prompt_logprobs": 1000},
    ],
)
def test_rules_that_the_sampler_could_not_follow_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        BOUNDS.submission(sequence(**params), "local")


def test_rules_within_the_vocabulary_pass() -> None:
    rules: dict[str, Any] = {
        "logit_bias": {99: -100.0},
        "allowed_token_ids": (0, 99),
        "bad_words": ((99,), (1, 2)),
        "top_logprobs": 20,
        "prompt_logprobs": 0,
    }
    submit = BOUNDS.submission(sequence(**rules), "local")
    assert submit.sampling == SamplingParams(max_tokens=5, **rules)
