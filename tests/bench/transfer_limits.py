"""What the links themselves can do, between the benchmark and a process of its own: no Diptych in it.

    python -m tests.bench.transfer_limits        (started by LimitSource only)

The other process serves a bare gRPC stream (of the same kind of server as a worker's), a raw TCP
socket, and memory for raw NIXL reads.
"""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import grpc
import grpc.aio
import msgspec

from services.core.malloc import keep_freed_memory
from services.launch.transfer_probe import model_geometry, new_pool
from services.transfer.nixl_agent import NixlAgent, Range
from services.transfer.nixl_reader import RemotePool
from services.transfer.pool_memory import PoolMemory
from services.wire.channel import listen, new_server, open_channel

_METHOD = "/bench.Bare/Stream"
_SOCKET_BYTES = 1 << 20


class Limits(msgspec.Struct, frozen=True):
    """Where the other process is reached."""

    grpc_address: str
    tcp_port: int
    pool: RemotePool | None


class LimitSource:
    """The benchmark's side: every method moves bytes and answers with the seconds that it took."""

    def __init__(self, pool_blocks: int, memory: PoolMemory) -> None:
        command = [sys.executable, "-m", "tests.bench.transfer_limits", str(pool_blocks)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.limits = msgspec.json.decode(self._process.stdout.readline(), type=Limits)
        self._memory = memory
        self._channel: grpc.aio.Channel | None = None
        self._agent: NixlAgent | None = None

    def memcpy(self, size: int, source: memoryview) -> float:
        target, started_s = self._memory.pool, time.perf_counter()
        for start in range(0, size, len(target)):
            part = min(len(target), size - start)
            target[:part] = source[:part]
        return time.perf_counter() - started_s

    def tcp(self, size: int) -> float:
        target = self._memory.pool
        with socket.create_connection(("127.0.0.1", self.limits.tcp_port)) as connection:
            started_s, left = time.perf_counter(), size
            connection.sendall(size.to_bytes(8, "little"))
            while left:
                left -= connection.recv_into(target, min(left, len(target)))
            return time.perf_counter() - started_s

    async def grpc(self, size: int, message_bytes: int) -> float:
        self._channel = self._channel or open_channel(self.limits.grpc_address)
        stream = self._channel.unary_stream(_METHOD, request_serializer=bytes, response_deserializer=bytes)
        started_s, left = time.perf_counter(), size
        async for message in stream(f"{size} {message_bytes}".encode()):
            left -= len(message)
        assert left <= 0
        return time.perf_counter() - started_s

    def nixl(self, size: int) -> float:
        """One read of everything, polled without a pause."""
        assert self.limits.pool is not None
        pool = self.limits.pool
        if self._agent is None:
            self._agent = NixlAgent("bench", self._memory.pool)
            self._peer = self._agent.add_peer(pool.metadata)
        started_s = time.perf_counter()
        for start in range(0, size, pool.bytes):
            handle = self._agent.post_read(
                self._peer, pool.address, [Range(0, 0, min(pool.bytes, size - start))]
            )
            while not self._agent.is_done(handle):
                pass
        return time.perf_counter() - started_s

    async def close(self) -> None:
        if self._channel:
            await self._channel.close()
        if self._agent:
            self._agent.close()
        self._process.kill()
        self._process.communicate()


@dataclass(slots=True)
class _Other:
    memory: PoolMemory

    async def stream(self, request: bytes, context: object):  # type: ignore[no-untyped-def]
        size, message_bytes = map(int, request.split())
        message = bytes(self.memory.pool[:message_bytes])
        for _ in range(-(-size // message_bytes)):
            yield message

    def serve_tcp(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                left, start = int.from_bytes(connection.recv(8), "little"), 0
                while left:
                    part = min(_SOCKET_BYTES, left, len(self.memory.pool) - start)
                    connection.sendall(self.memory.pool[start : start + part])
                    left, start = left - part, (start + part) % len(self.memory.pool)

    async def serve(self, with_nixl: bool) -> None:
        server = new_server()
        handler = grpc.unary_stream_rpc_method_handler(self.stream, bytes, bytes)
        service, _, method = _METHOD.strip("/").rpartition("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        address = f"127.0.0.1:{listen(server, '127.0.0.1', 0)}"
        await server.start()
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.serve_tcp, args=(listener,), daemon=True).start()
        pool = None
        if with_nixl:
            agent = NixlAgent("limits", self.memory.pool)
            pool = RemotePool(agent.metadata(), agent.address, agent.bytes)
        print(msgspec.json.encode(Limits(address, listener.getsockname()[1], pool)).decode(), flush=True)
        await server.wait_for_termination()


def has_nixl() -> bool:
    from services.core.errors import TransportUnavailable
    from services.transfer.nixl_agent import load_bindings

    try:
        load_bindings()
    except TransportUnavailable:
        return False
    return True


if __name__ == "__main__":
    keep_freed_memory()
    asyncio.run(_Other(new_pool(model_geometry(int(sys.argv[1])))).serve(has_nixl()))
