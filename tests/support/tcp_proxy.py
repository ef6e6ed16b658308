"""A network link that a test controls: a TCP proxy that can delay, hold up, cut and change what passes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

_READ_BYTES = 1 << 16


@dataclass(slots=True)
class TcpProxy:
    """Forwards connections to `target` (host:port). Settings take effect on bytes that come later."""

    target: str
    delay_s: float = 0.0  # each way
    tamper: Callable[[bytes], bytes] = lambda passing: passing  # what comes back from the target
    address: str = ""
    _cut: bool = False
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _flowing_back: asyncio.Event = field(default_factory=asyncio.Event)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def cut(self) -> None:
        """Reset every connection, and those to come."""
        self._cut = True
        for writer in list(self._writers):
            writer.transport.abort()

    def mend(self) -> None:
        self._cut = False

    def hold_up(self, back: bool = True) -> None:
        """Nothing passes any more, though no connection ends: a black hole. With `back` False, only what
        comes from the target still does."""
        self._flowing.clear()
        if back:
            self._flowing_back.clear()

    def let_go(self) -> None:
        self._flowing.set()
        self._flowing_back.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.transport.abort()
            return
        host, port = self.target.rsplit(":", 1)
        try:
            back_reader, back_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back_writer}
        await asyncio.gather(
            self._forward(reader, back_writer, back=False), self._forward(back_reader, writer, back=True)
        )

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: bool) -> None:
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        arriving = asyncio.create_task(self._deliver(on_the_way, writer, back))
        try:
            with suppress(OSError):
                while passing := await reader.read(_READ_BYTES):
                    on_the_way.put_nowait((time.monotonic() + self.delay_s, passing))
            on_the_way.put_nowait((0.0, b""))
            await arriving
        finally:
            arriving.cancel()
            writer.close()
            self._writers.discard(writer)

    async def _deliver(
        self, on_the_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, back: bool
    ) -> None:
        with suppress(OSError):
            while (next_one := await on_the_way.get())[1]:
                due_s, passing = next_one
                await asyncio.sleep(due_s - time.monotonic())
                await (self._flowing_back if back else self._flowing).wait()
                writer.write(self.tamper(passing) if back else passing)
                await writer.drain()


@asynccontextmanager
async def tcp_proxy(target: str) -> AsyncIterator[TcpProxy]:
    proxy = TcpProxy(target)
    proxy.let_go()
    connections: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(proxy._serve(reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
        proxy.let_go()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
