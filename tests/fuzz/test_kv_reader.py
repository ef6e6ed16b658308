"""Whatever a source of KV sends, its reader ends the sequence, keeps nothing of it, and goes on serving."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import grpc
import grpc.aio

from services.transfer.checksum import crc32c
from services.wire.channel import listen, new_server
from services.wire.generated import transfer_pb2, worker_pb2
from tests.fuzz.messages import Known, random_bytes, random_message
from tests.support.in_process_workers import running_pair
from tests.unit.decode.test_disaggregated_pair import PROMPT, Session, alone, sequence

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 40) // 12
AT_ONCE = 12
BLOCK = 32  # bytes of one of the pair's
_FIRSTS = [worker_pb2.SampledToken(token=5)]
KNOWN: Known = {
    "block_size": [4, 4, 8, 2],
    "obstacle": [""],
    "nixl_pool": [b""],
    "first_token": [0, 0, 4, 8],
    "tokens": [4, 8, len(PROMPT), 3, 0],
    "payload": [bytes(BLOCK), bytes(2 * BLOCK), bytes(3 * BLOCK), b""],
    "firsts": [_FIRSTS, _FIRSTS, []],
    "exposed_ms": [0.0],
    "valid": [True, True, False],
}


class Source:
    """Serves KvTransfer. Half of its transfers are whole, but for what is drawn into them."""

    def __init__(self) -> None:
        self.random = Random(0)

    async def pull(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        random = self.random
        if random.random() < 0.5:
            header = transfer_pb2.KvHeader(block_size=4)
            yield transfer_pb2.KvMessage(header=header).SerializeToString()
        if random.random() < 0.5:
            yield _chunk(transfer_pb2.KvChunk(tokens=len(PROMPT), payload=bytes(3 * BLOCK)))
            yield _chunk(transfer_pb2.KvChunk(first_token=len(PROMPT), firsts=_FIRSTS))
        for _ in range(random.choice([0, 1, 3, 20])):
            if random.random() < 0.1:
                yield random_bytes(transfer_pb2.KvMessage, random, KNOWN)
            else:
                yield self._message()

    def _message(self) -> bytes:
        message = random_message(transfer_pb2.KvMessage, self.random, KNOWN)
        if message.HasField("chunk") and self.random.random() < 0.9:
            return _chunk(message.chunk)
        return message.SerializeToString()

    async def release(self, request: bytes, context: Any) -> bytes:
        return random_bytes(transfer_pb2.ReleaseReply, self.random, KNOWN)

    async def lend(self, request: bytes, context: Any) -> bytes:
        return random_bytes(transfer_pb2.LendReply, self.random, KNOWN)


def _chunk(chunk: transfer_pb2.KvChunk) -> bytes:
    """With the checksum that it should have."""
    chunk.crc32c = crc32c(chunk.payload)
    return transfer_pb2.KvMessage(chunk=chunk).SerializeToString()


@asynccontextmanager
async def serving(source: Source) -> AsyncIterator[str]:
    server = new_server()
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Pull": grpc.unary_stream_rpc_method_handler(source.pull),
        "Release": grpc.unary_unary_rpc_method_handler(source.release),
        "Lend": grpc.unary_unary_rpc_method_handler(source.lend),
    }
    handler = grpc.method_handlers_generic_handler("diptych.v1.KvTransfer", handlers)
    server.add_generic_rpc_handlers((handler,))
    port = listen(server, "127.0.0.1", 0)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def submit(session: Session, name: str, source: worker_pb2.KvSource, fetched: bool) -> None:
    """A sequence that is received, or whose prefix is fetched."""
    one = sequence(name)
    if fetched:
        one.prefix.CopyFrom(worker_pb2.PrefixSource(worker=source, tokens=8))
    await session.submit(one, None if fetched else source)


async def end(session: Session, name: str) -> str:
    """How it ended."""
    async with asyncio.timeout(10):
        while True:
            event = await session.events[name].get()
            if event.HasField("failure"):
                return str(event.failure.code)
            if event.HasField("token") and event.token.finish:
                return "finished"


async def test_every_sequence_ends_and_nothing_of_it_is_left() -> None:
    source, random, seen = Source(), Random(1), list[str]()
    expected = await alone(sequence("ordinary"))
    async with serving(source) as address, running_pair() as pair:
        wire = worker_pb2.KvSource(worker_id="p", address=address, epoch=11)
        for seed in range(EXAMPLES):
            source.random = Random(seed)
            session = Session(pair)
            names = [f"r{seed}-{number}" for number in range(AT_ONCE)]
            for name in names:
                await submit(session, name, wire, fetched=random.random() < 0.4)
            seen += [await end(session, name) for name in names]
            await session.close()
            await pair.idle()
        session = Session(pair)
        ordinary = sequence("ordinary")
        ordinary.salt = "what was received under no salt is of no use here"
        await session.submit(ordinary)
        assert await session.tokens("ordinary") == expected
        await session.close()
    assert len(set(seen)) > 3, f"the source always ended the same way: {set(seen)}"
