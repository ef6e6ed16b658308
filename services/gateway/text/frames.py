"""What a gateway and its child processes say to each other: 4 bytes of length (little-endian), then a body.

The child's side, which imports nothing more.
"""

from typing import BinaryIO

LENGTH_BYTES = 4


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def read_frame(reader: BinaryIO) -> bytes:
    """The next body; empty at the end."""
    header = reader.read(LENGTH_BYTES)
    return reader.read(int.from_bytes(header, "little")) if header else b""


def write_frame(writer: BinaryIO, body: bytes) -> None:
    writer.write(framed(body))
    writer.flush()
