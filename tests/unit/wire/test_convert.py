"""What a peer sends that this version does not know."""

from services.wire.convert import finish_from_wire, finish_to_wire


def test_every_reason_to_end_comes_back_as_it_was_sent() -> None:
    assert [finish_from_wire(finish_to_wire(finish)) for finish in (None, "stop", "length")] == [
        None,
        "stop",
        "length",
    ]


def test_a_reason_of_a_newer_peer_ends_the_answer() -> None:
    assert finish_from_wire(99) == "stop"  # type: ignore[arg-type]
