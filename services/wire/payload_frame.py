"""KvMessages with large payloads, to and from bytes with one copy less on each side than protobuf makes.

The bytes are ordinary protobuf: a message may come in pieces, and readers merge them. So the payload
stands alone in a last piece, where it can be put and found without handing it through a message object:

    | KvMessage{chunk{all but the payload}} | tag of chunk, length | tag of payload, length | payload |
"""

from services.wire.generated import transfer_pb2

_LENGTH_DELIMITED = 2  # the wire type in the low three bits of a tag
_CHUNK_TAG = transfer_pb2.KvMessage.CHUNK_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_PAYLOAD_TAG = transfer_pb2.KvChunk.PAYLOAD_FIELD_NUMBER << 3 | _LENGTH_DELIMITED


def join_payload(message: transfer_pb2.KvMessage, payload: bytes | memoryview) -> bytes:
    """`message`, whose chunk has no payload yet, with this one."""
    inner = bytes([_PAYLOAD_TAG]) + _varint(len(payload))
    outer = bytes([_CHUNK_TAG]) + _varint(len(inner) + len(payload))
    return b"".join((message.SerializeToString(), outer, inner, payload))


def split_payload(data: bytes) -> tuple[transfer_pb2.KvMessage, memoryview]:
    """The message without its payload, and the payload: a view of `data`, whoever encoded it.

    Raises google.protobuf.message.DecodeError for anything but a KvMessage.
    """
    view = memoryview(data)
    try:
        at = 0
        while at < len(data):
            length, start = _read_varint(data, at + 1)
            if data[at] == _CHUNK_TAG and data[start] == _PAYLOAD_TAG:
                payload_bytes, payload_start = _read_varint(data, start + 1)
                if payload_start + payload_bytes == start + length == len(data):
                    message = transfer_pb2.KvMessage.FromString(bytes(view[:at]))
                    if message.HasField("chunk"):
                        return message, view[payload_start:]
            at = start + length
    except IndexError:
        pass  # protobuf says what is wrong with it
    message = transfer_pb2.KvMessage.FromString(data)
    return message, memoryview(message.chunk.payload)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The value at `at`, and where the next thing begins. Raises IndexError at the end of `data`."""
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
