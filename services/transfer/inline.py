"""KV that travels inside the messages: from chunks to bytes in their place."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from services.core.errors import KvCorrupt
from services.transfer.destination import Destination
from services.transfer.protocol import Arrived, KvChunk, KvHeader


async def place_inline(
    messages: AsyncGenerator[KvHeader | KvChunk, None], destination: Destination, first_token: int
) -> AsyncGenerator[Arrived, None]:
    """Place every chunk; what is before `first_token` stays as it is. The payloads' checksums held.

    Raises KvCorrupt for messages in a wrong order or of a wrong size.
    """
    async with aclosing(messages):
        header = await anext(messages, None)
        if not isinstance(header, KvHeader):
            raise KvCorrupt("the transfer began without its header")
        async for chunk in messages:
            if isinstance(chunk, KvHeader):
                raise KvCorrupt("the transfer has a second header")
            arrived = _place(chunk, header, destination, first_token)
            first_token = arrived.first_token + arrived.tokens
            yield arrived


def _place(chunk: KvChunk, header: KvHeader, destination: Destination, after: int) -> Arrived:
    start = destination.place(chunk.first_token, chunk.tokens, chunk.payload, header.block_size, after)
    tokens = chunk.first_token + chunk.tokens - start
    return Arrived(start, tokens, len(chunk.payload), True, chunk.firsts, chunk.exposed_ms)
