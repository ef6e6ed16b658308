"""What is sent comes back as it was, and what a peer sends that this version does not know."""

from hypothesis import given
from hypothesis import strategies as st

from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.core.sampling import SamplingParams
from services.gateway.workers.sequence_wire import token_from_wire
from services.gateway.workers.worker_client import OutputToken
from services.wire.convert import (
    finish_from_wire,
    finish_to_wire,
    prompt_logprobs_from_wire,
    prompt_logprobs_to_wire,
    sampled_to_wire,
    sampling_from_wire,
    sampling_to_wire,
)
from services.wire.generated import worker_pb2

TOKEN_IDS = st.integers(0, 2**31 - 1)
LOGPROBS = st.builds(
    TokenLogprobs,
    logprob=st.floats(max_value=0, width=32, allow_nan=False),
    rank=st.integers(1, 10**6),
    top_ids=st.lists(TOKEN_IDS, max_size=20).map(tuple),
    top_logprobs=st.lists(st.floats(max_value=0, width=32, allow_nan=False), max_size=20).map(tuple),
)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 1000),
    end_token_ids=st.lists(TOKEN_IDS).map(tuple),
    grammar=st.text(max_size=5),
    top_logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    logit_bias=st.dictionaries(TOKEN_IDS, st.floats(-100, 100)),
    allowed_token_ids=st.lists(TOKEN_IDS).map(tuple),
    bad_words=st.lists(st.lists(TOKEN_IDS, min_size=1).map(tuple)).map(tuple),
)


def test_every_reason_to_end_comes_back_as_it_was_sent() -> None:
    assert [finish_from_wire(finish_to_wire(finish)) for finish in (None, "stop", "length")] == [
        None,
        "stop",
        "length",
    ]


def test_a_reason_of_a_newer_peer_ends_the_answer() -> None:
    assert finish_from_wire(99) == "stop"  # type: ignore[arg-type]


@given(SAMPLING)
def test_sampling_parameters_come_back_as_they_were_sent(params: SamplingParams) -> None:
    sent = sampling_to_wire(params).SerializeToString()
    assert sampling_from_wire(worker_pb2.SamplingParams.FromString(sent)) == params


@given(st.none() | LOGPROBS)
def test_a_token_comes_back_with_its_logprobs(logprobs: TokenLogprobs | None) -> None:
    sent = sampled_to_wire(3, 42, "stop", 2, logprobs).SerializeToString()
    received = token_from_wire(worker_pb2.SampledToken.FromString(sent))
    assert received == OutputToken(3, 42, "stop", 2, logprobs)


def test_logprobs_of_a_prompt_come_back_as_they_were_sent() -> None:
    sent = PromptLogprobs(5, 1, b"\0\0\x80\xbf" * 2, b"\1\0\0\0" * 2, b"\7\0\0\0" * 2, b"\0\0\0\xbf" * 2)
    received = prompt_logprobs_from_wire(prompt_logprobs_to_wire(sent))
    assert received == sent
    assert received.end == 7
    assert list(received.tokens()) == [TokenLogprobs(-1.0, 1, (7,), (-0.5,))] * 2
