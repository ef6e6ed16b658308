"""Framed messages are ordinary protobuf: both ways, whoever wrote them."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from services.wire.generated import transfer_pb2
from services.wire.payload_frame import join_payload, split_payload

SIZES = (0, 1, 127, 128, 300, 16_383, 16_384, 100_000)


def message(payload: bytes = b"") -> transfer_pb2.KvMessage:
    chunk = transfer_pb2.KvChunk(
        first_token=300, tokens=17, payload=payload, crc32c=5, exposed_ms=1.5, blocks=[1, 300]
    )
    return transfer_pb2.KvMessage(chunk=chunk)


@pytest.mark.parametrize("size", SIZES)
def test_protobuf_reads_what_we_join(size: int) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    assert transfer_pb2.KvMessage.FromString(join_payload(message(), payload)) == message(payload)


@pytest.mark.parametrize("size", SIZES)
def test_we_split_what_we_join_and_what_protobuf_writes(size: int) -> None:
    payload = b"\x12" * size
    for data in (join_payload(message(), payload), message(payload).SerializeToString()):
        found, view = split_payload(data)
        assert bytes(view) == payload
        found.chunk.ClearField("payload")
        assert found == message()


def test_a_joined_payload_is_not_copied_by_the_split() -> None:
    data = join_payload(message(), b"x" * 1000)
    _, view = split_payload(data)
    assert view.obj is data


def test_a_header_has_no_payload() -> None:
    header = transfer_pb2.KvMessage(header=transfer_pb2.KvHeader(block_size=16, nixl_pool=b"\x1a\x01x"))
    found, view = split_payload(header.SerializeToString())
    assert found == header
    assert len(view) == 0


@given(st.binary(max_size=60))
def test_garbage_is_read_as_protobuf_reads_it_or_refused(data: bytes) -> None:
    try:
        expected = transfer_pb2.KvMessage.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            split_payload(data)
        return
    found, view = split_payload(data)
    if expected.HasField("chunk"):
        found.chunk.payload = bytes(view)
    assert found == expected
