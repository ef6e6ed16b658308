"""A peer that says nothing is found soon, whether it was connected or not."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from services.core.errors import WorkerLost
from services.wire.channel import from_rpc_error, listen, new_server, open_channel
from tests.support.tcp_proxy import TcpProxy, tcp_proxy

FOUND_S = 4.0  # 2 s by the settings, doubled for a busy machine; gRPC's defaults are 20 s and more


class Endless(grpc.GenericRpcHandler):
    """Answers once, and then never ends the call."""

    def service(self, details: object) -> grpc.RpcMethodHandler:
        async def answer(request: bytes, context: object) -> AsyncIterator[bytes]:
            yield b"first"
            await asyncio.Event().wait()

        return grpc.unary_stream_rpc_method_handler(answer)


@pytest.fixture
async def link() -> AsyncIterator[TcpProxy]:
    server = new_server()
    server.add_generic_rpc_handlers((Endless(),))
    port = listen(server, "127.0.0.1", 0)
    await server.start()
    async with tcp_proxy(f"127.0.0.1:{port}") as link:
        yield link
    await server.stop(0)


@pytest.fixture
async def channel(link: TcpProxy) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(link.address) as channel:
        yield channel


async def lost(call: grpc.aio.UnaryStreamCall) -> float:
    """Wait until the call is found to be broken; how long that took, in seconds."""
    started_s = time.monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async with asyncio.timeout(30):
            await call.read()
    assert isinstance(from_rpc_error(raised.value, "peer"), WorkerLost)
    return time.monotonic() - started_s


async def test_a_peer_that_falls_silent_is_found(link: TcpProxy, channel: grpc.aio.Channel) -> None:
    call = channel.unary_stream("/any/method")(b"")
    assert await call.read() == b"first"
    link.hold_up()
    assert await lost(call) < FOUND_S


async def test_a_peer_that_accepts_a_connection_and_says_nothing_is_found(
    link: TcpProxy, channel: grpc.aio.Channel
) -> None:
    link.hold_up()
    assert await lost(channel.unary_stream("/any/method")(b"")) < FOUND_S


async def test_a_slow_peer_is_not_taken_for_silent(link: TcpProxy, channel: grpc.aio.Channel) -> None:
    link.delay_s = 0.2
    call = channel.unary_stream("/any/method")(b"")
    assert await call.read() == b"first"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(FOUND_S):
            await call.read()


def test_grpc_leaves_forks_alone_in_every_process_of_ours() -> None:
    """See services/__init__.py. What it does is rare: here is only that it was said before gRPC was there."""
    said = "import sys, services; assert 'grpc' not in sys.modules; import services.wire.channel, os; "
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    command = [sys.executable, "-c", said + "print(os.environ['GRPC_ENABLE_FORK_SUPPORT'])"]
    assert subprocess.run(command, env=environment, check=True, capture_output=True).stdout == b"0\n"
