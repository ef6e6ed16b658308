"""A worker that pulls from many others keeps a bounded number of connections, and those in use."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from services.transfer import grpc_transport
from services.transfer.grpc_transport import GrpcKvTransport
from services.transfer.protocol import KvSource
from services.wire.channel import Network
from services.wire.generated import transfer_pb2
from tests.support.in_process_engine import compatibility

Reply = Callable[..., Awaitable[transfer_pb2.ReleaseReply]]


class ScriptedChannel:
    """Its calls end when `answers` is set; closing takes a few turns of the loop."""

    def __init__(self, answers: asyncio.Event) -> None:
        self._answers = answers
        self.closed = False

    def unary_stream(self, *_: Any, **__: Any) -> None:
        pass

    def unary_unary(self, *_: Any, **__: Any) -> Reply:
        async def call(request: Any, timeout: float | None = None) -> transfer_pb2.ReleaseReply:
            await self._answers.wait()
            return transfer_pb2.ReleaseReply(valid=not self.closed)

        return call

    async def close(self) -> None:
        self.closed = True
        for _ in range(5):
            await asyncio.sleep(0)


async def test_connections_beyond_the_bound_are_closed_but_none_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grpc_transport, "_CHANNELS_MAX", 2)
    answers = asyncio.Event()
    channels: dict[str, ScriptedChannel] = {}

    def open_channel(address: str) -> Any:
        channels[address] = ScriptedChannel(answers)
        return channels[address]

    transport = GrpcKvTransport(compatibility(), Network(open_channel))

    def release(address: str) -> "asyncio.Task[bool]":
        return asyncio.create_task(transport.release(KvSource(address, address, 1), "r/0"))

    answers.set()
    assert await release("old:1")
    assert await release("old:2")
    answers.clear()
    running = [release("new:1"), release("new:2")]
    await asyncio.sleep(0)
    answers.set()
    assert all(await asyncio.gather(*running))
    assert [address for address, channel in channels.items() if channel.closed] == ["old:1", "old:2"]

    await transport.close()
