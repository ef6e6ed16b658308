"""gRPC in memory, between simulated processes: what services.wire.channel.Network offers, with faults.

Production stubs and servicers run over it unchanged, messages serialised as on the wire (see call.py).
A link between two hosts may be slow, cut (calls break, new ones are refused) or silent (messages wait,
and keepalive breaks the calls). A stopped process does not answer keepalive either.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from services.wire.channel import Network
from tests.sim.call import ClientCall, SimCall
from tests.sim.loop import Process
from tests.sim.trace import Trace

KEEPALIVE_S = 2.0  # services/wire/channel.py: a ping after 1 s, an answer within 1 s


@dataclass(slots=True)
class Link:
    """Between two hosts, both ways."""

    extra_s: float = 0.0
    cut: bool = False
    silent: bool = False
    flips: int = 0  # KV messages that will arrive with a flipped byte
    held: list[Callable[[], None]] = field(default_factory=list)  # deliveries that wait for silence to end


class SimNetwork:
    def __init__(self, rng: random.Random, trace: Trace, on_bug: Callable[[str], None]) -> None:
        self.rng = rng
        self._latency_s = rng.choice([(0.0002, 0.001), (0.0002, 0.001), (0.002, 0.01)])
        self.trace = trace
        self.on_bug = on_bug
        self.servers: dict[str, SimServer] = {}  # by address
        self.calls: dict[SimCall, None] = {}  # that have not ended on both sides
        self.flipped = 0
        self.on_pull: Callable[[], None] = lambda: None  # told of every message of a pull
        self.tamper: Callable[[SimCall, bytes], bytes | None] = _honest
        self._links: dict[tuple[str, str], Link] = {}
        self._ports = 7000
        self.calls_opened = 0

    def of(self, process: Process) -> Network:
        """As `process` sees the network."""
        return Network(
            open_channel=lambda address: SimChannel(self, process, address),  # type: ignore[arg-type, return-value]
            new_server=lambda: SimServer(self, process),  # type: ignore[arg-type, return-value]
        )

    def link(self, one: str, other: str) -> Link:
        key = (min(one, other), max(one, other))
        return self._links.setdefault(key, Link())

    def deliver(self, link: Link, receiver: Process, arrive: Callable[[], None]) -> None:
        """Let `arrive` happen at the receiver after the link's delay."""
        if link.silent:
            link.held.append(lambda: self.deliver(link, receiver, arrive))
        else:
            receiver.call_later(self.rng.uniform(*self._latency_s) + link.extra_s, arrive)

    def cut(self, one: str, other: str) -> None:
        """Break what runs between two hosts and refuse the rest, until `mend`."""
        self.link(one, other).cut = True
        for call in self._calls_between(one, other):
            call.break_off("connection reset")

    def silence(self, one: str, other: str) -> None:
        """Let nothing through between two hosts, until `mend`; keepalive notices."""
        link = self.link(one, other)
        link.silent = True
        for call in self._calls_between(one, other):
            call.client.call_later(KEEPALIVE_S, partial(self._if_silent, link, call))

    def mend(self, one: str, other: str) -> None:
        link = self.link(one, other)
        link.cut = link.silent = False
        link.extra_s = 0.0
        held, link.held = link.held, []
        for delivery in held:
            delivery()

    def stopped(self, process: Process) -> None:
        """`process` was stopped: whoever is still connected after a while takes it for dead."""
        for call in [call for call in self.calls if process in (call.client, call.process)]:
            other = call.process if call.client is process else call.client
            if other is not None:
                other.call_later(KEEPALIVE_S, partial(self._if_stopped, process, call))

    def died(self, process: Process) -> None:
        """`process` is gone: its kernel resets its connections."""
        for address in [address for address, server in self.servers.items() if server.process is process]:
            del self.servers[address]
        for call in [call for call in self.calls if process in (call.client, call.process)]:
            call.break_off("connection reset by peer")

    def new_port(self) -> int:
        self._ports += 1
        return self._ports

    def _calls_between(self, one: str, other: str) -> list[SimCall]:
        return [call for call in self.calls if {call.client.name, call.host} == {one, other}]

    def _if_silent(self, link: Link, call: SimCall) -> None:
        if link.silent and call in self.calls:
            call.break_off("keepalive watchdog timeout")

    def _if_stopped(self, process: Process, call: SimCall) -> None:
        if process.stopped and call in self.calls:
            call.break_off("keepalive watchdog timeout")


def _honest(call: SimCall, reply: bytes) -> bytes | None:
    """What reaches the client of a reply; tests put in something else, to see it found."""
    return reply


class SimChannel:
    """grpc.aio.Channel, as far as generated stubs use it."""

    def __init__(self, network: SimNetwork, process: Process, address: str) -> None:
        self._network, self._process, self._address = network, process, address
        self._calls: list[SimCall] = []

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(request: Any, timeout: float | None = None, **_: Any) -> ClientCall:
            return self._with_request(
                path, request_serializer(request), request_serializer, response_deserializer, timeout
            )

        return call

    unary_stream = unary_unary

    def stream_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(timeout: float | None = None, **_: Any) -> ClientCall:
            opened = self._open(path, response_deserializer, timeout)
            return ClientCall(opened, request_serializer, response_deserializer)

        return call

    async def close(self, grace: float | None = None) -> None:
        for call in self._calls:
            call.cancel()

    def _with_request(
        self, path: str, request: bytes, serialize: Any, deserialize: Any, timeout: float | None
    ) -> ClientCall:
        call = self._open(path, deserialize, timeout)
        if call.connects:
            call.requests.push(request)
        return ClientCall(call, serialize, deserialize)

    def _open(self, path: str, deserialize: Any, timeout: float | None) -> SimCall:
        self._calls = [call for call in self._calls if not call.client_over]
        call = SimCall(self._network, self._process, self._address, path, deserialize)
        self._calls.append(call)
        if timeout is not None:
            self._process.call_later(timeout, call.expire)
        return call


class SimServer:
    """grpc.aio.Server, as far as a worker uses it."""

    def __init__(self, network: SimNetwork, process: Process) -> None:
        self._network = network
        self.process = process
        self.methods: dict[str, Any] = {}
        self.calls: dict[SimCall, None] = {}
        self.closed = False
        self._address = ""

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The registered handlers, which generated code adds too, are enough."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.methods |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def add_insecure_port(self, address: str) -> int:
        host, port = address.rsplit(":", 1)
        number = int(port) or self._network.new_port()
        self._address = f"{host}:{number}"
        return number

    async def start(self) -> None:
        self._network.servers[self._address] = self

    async def stop(self, grace: float | None) -> None:
        """Refuse new calls; cut those that run when the grace period is over."""
        self.closed = True
        if self._network.servers.get(self._address) is self:
            del self._network.servers[self._address]
        if grace:
            await self._wait(grace)
        for call in list(self.calls):
            call.cut_by_server()
        await self._wait(None)

    async def _wait(self, seconds: float | None) -> None:
        handlers = [call.handler for call in self.calls if call.handler is not None]
        if handlers:
            await asyncio.wait(handlers, timeout=seconds)
