"""What a peer sends is refused where it could break a step."""

from typing import Any

import pytest

from services.core.errors import BadRequest
from services.core.sampling import SamplingParams
from services.engine.submission import TEXT_BYTES_MAX, SequenceBounds
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
        {"logit_bias": {1: -1e39}},
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


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": -1e300},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"end_token_ids": (-1,)},
        {"end_token_ids": tuple(range(3000))},
        {"bad_words": ((1,),) * 2000},
        {"grammar": "x" * (TEXT_BYTES_MAX + 1)},
    ],
)
def test_numbers_that_mean_nothing_are_refused_with_their_name(params: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as raised:
        BOUNDS.submission(sequence(**params), "local")
    assert raised.value.param in params


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": ""},
        {"request_id": "x" * 1000},
        {"salt": "x" * 1000},
        {"prompt_ids": []},
        {"prompt_ids": [-1]},
        {"prompt_ids": [100]},
        {"prompt_ids": [1] * 46},
        {"output_ids": [100]},
        {"output_ids": [1] * 5},
        {"choice_ids": [1, 1]},
        {"choice_ids": list(range(200))},
        {"choice_ids": [2**32 - 1]},
    ],
)
def test_sequences_that_fit_nowhere_are_refused(changes: dict[str, Any]) -> None:
    wire = sequence()
    for name, value in changes.items():
        if isinstance(value, list):
            wire.ClearField(name)
            getattr(wire, name).extend(value)
        else:
            setattr(wire, name, value)
    with pytest.raises(BadRequest):
        BOUNDS.submission(wire, "local")
