"""KV that travels inside the messages: from chunks to bytes in their place."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.core.errors import KvCorrupt
from services.transfer.destination import Destination
from services.transfer.protocol import Arrived, KvChunk, KvHeader

Messages = AsyncGenerator[KvHeader | KvChunk, None]


async def read_header(messages: Messages) -> KvHeader:
    """Raises KvCorrupt if something else comes first, or a header that says nothing."""
    header = await anext(messages, None)
    if not isinstance(header, KvHeader) or not header.block_size:
        raise KvCorrupt("the transfer began without its header")
    return header


def as_chunk(message: KvHeader | KvChunk) -> KvChunk:
    """Raises KvCorrupt if it is none."""
    if isinstance(message, KvHeader):
        raise KvCorrupt("the transfer has a second header")
    return message


async def place_inline(
    messages: Messages, destination: Destination, first_token: int
) -> AsyncGenerator[Arrived, None]:
    """Place every chunk; what is before `first_token` stays as it is. The payloads' checksums held.

    Raises KvCorrupt for messages in a wrong order or of a wrong size.
    """
    async with aclosing(messages):
        header = await read_header(messages)
        async for arrived in place_chunks(header, messages, destination, first_token):
            yield arrived


async def place_chunks(
    header: KvHeader, messages: Messages, destination: Destination, first_token: int
) -> AsyncGenerator[Arrived, None]:
    """What follows the header; `messages` are closed by the caller."""
    async for message in messages:
        arrived = _place(as_chunk(message), header, destination, first_token)
        first_token = arrived.first_token + arrived.tokens
        yield arrived


def _place(chunk: KvChunk, header: KvHeader, destination: Destination, after: int) -> Arrived:
    start = destination.place(chunk.first_token, chunk.tokens, chunk.payload, header.block_size, after)
    tokens = chunk.first_token + chunk.tokens - start
    return Arrived(start, tokens, len(chunk.payload), True, chunk.firsts, chunk.exposed_ms)
