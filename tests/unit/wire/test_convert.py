"""What crosses the wire comes back as it was sent; what a peer sends that this version does not know."""

from services.core.sampling import SamplingParams
from services.wire.convert import finish_from_wire, finish_to_wire, sampling_from_wire, sampling_to_wire


def test_sampling_parameters_come_back_as_they_were_sent() -> None:
    params = SamplingParams(max_tokens=3, seed=2**63 + 1, end_token_ids=(2, 7), grammar='start: "é"')
    assert sampling_from_wire(sampling_to_wire(params)) == params


def test_every_reason_to_end_comes_back_as_it_was_sent() -> None:
    assert [finish_from_wire(finish_to_wire(finish)) for finish in (None, "stop", "length")] == [
        None,
        "stop",
        "length",
    ]


def test_a_reason_of_a_newer_peer_ends_the_answer() -> None:
    assert finish_from_wire(99) == "stop"  # type: ignore[arg-type]
