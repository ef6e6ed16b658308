"""KV transfers between two processes of this machine, to see what works and how fast.

The other process is a source without an engine: a pool of zeros, leases, and a KvServer over real gRPC
and NIXL. It is told line by line which prefill to pretend, and ends with its stdin.

    python -m services.launch.transfer_probe       (started by ProbeSource only)
"""

import asyncio
import mmap
import os
import sys
import time
from types import TracebackType

import msgspec

from services.core.block_hash import Compatibility
from services.core.clock import SystemClock
from services.core.errors import KvSourceLost, TransportUnavailable
from services.core.malloc import keep_freed_memory
from services.launch.lock import lock_from_state, lock_to_state
from services.model.pool_geometry import PoolGeometry
from services.transfer.destination import Destination
from services.transfer.grpc_transport import serve_kv
from services.transfer.lease import LeaseTable
from services.transfer.nixl_source import NixlSource
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import FirstToken, KvSource, KvTransport
from services.transfer.receive import Received, ReceiveObserver, receive_kv
from services.transfer.server import KvServer
from services.wire.channel import TCP, Network
from services.wire.cluster_lock import ClusterLock, lock_network
from services.worker.transports import KvTransports, open_transports

_EPOCH = 1
_START_TIMEOUT_S = 30.0
_PULL_WAIT_S = 5.0


class ProbeSetup(msgspec.Struct, frozen=True):
    geometry: PoolGeometry
    with_nixl: bool
    lock: dict[str, str] = {}  # settings of section [cluster]


class Prefill(msgspec.Struct, frozen=True):
    """A prompt to pretend to compute: `chunk_tokens` after every `chunk_ms`; 0: all is there."""

    transfer_id: str
    tokens: int
    chunk_tokens: int = 0
    chunk_ms: float = 0.0


class ProbeReady(msgspec.Struct, frozen=True):
    address: str
    nixl_obstacle: str  # why it has no NIXL, or nothing


def model_geometry(blocks: int) -> PoolGeometry:
    """Blocks like those of the default model: 737,280 bytes each."""
    return PoolGeometry(blocks, layers=30, kv_heads=3, block_size=16, head_dim=64)


def new_pool(geometry: PoolGeometry) -> PoolMemory:
    """Shared memory as workers have it, with all its pages present."""
    fd = os.memfd_create("diptych-probe")
    os.ftruncate(fd, geometry.shared_bytes)
    memory = memoryview(mmap.mmap(fd, geometry.shared_bytes))
    os.close(fd)
    page = bytes(1 << 20)
    for start in range(0, len(memory), len(page)):
        memory[start : start + len(page)] = page[: len(memory) - start]
    return PoolMemory(geometry, memory)


class ProbeSource:
    """The parent's side of the other process."""

    def __init__(self, geometry: PoolGeometry, with_nixl: bool, lock: ClusterLock | None = None) -> None:
        self._setup = ProbeSetup(geometry, with_nixl, lock_to_state(lock) if lock else {})
        self._transfers = 0

    async def __aenter__(self) -> "ProbeSource":
        """Raises KvSourceLost if the process does not come up."""
        keep_freed_memory()  # as workers do
        command = [sys.executable, "-m", "services.launch.transfer_probe"]
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
        self._tell(self._setup)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                assert self._process.stdout is not None
                line = await self._process.stdout.readline()
            ready = msgspec.json.decode(line, type=ProbeReady)
        except (TimeoutError, msgspec.DecodeError):
            await self._end()
            raise KvSourceLost("the second process of the probe did not start") from None
        self.nixl_obstacle = ready.nixl_obstacle
        self.source = KvSource("probe", ready.address, _EPOCH)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def transfer(
        self,
        transport: KvTransport,
        memory: PoolMemory,
        tokens: int,
        chunk_tokens: int = 0,
        chunk_ms: float = 0.0,
    ) -> Received:
        """Pull the KV of a prompt, from the request for its first block to the confirmed lease.

        A prompt longer than the pools runs through their blocks again.
        """
        self._transfers += 1
        prefill = Prefill(f"probe/{self._transfers}", tokens, chunk_tokens, chunk_ms)
        self._tell(prefill)
        destination = Destination(memory, _table(tokens, memory.geometry), tokens, held_tokens=0)
        observer = ReceiveObserver(landed=lambda tokens, proven: None)
        return await receive_kv(
            transport, self.source, prefill.transfer_id, destination, SystemClock(), observer
        )

    def _tell(self, message: ProbeSetup | Prefill) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(message) + b"\n")

    async def _end(self) -> None:
        self._process.kill()
        await self._process.communicate()


def compatibility(geometry: PoolGeometry) -> Compatibility:
    return Compatibility(model="probe", revision="", block_size=geometry.block_size, layout=geometry.layout)


async def open_reading(names: list[str], memory: PoolMemory, network: Network = TCP) -> KvTransports:
    """A reader's transports, exactly these. Raises ConfigError if one of them is not here."""
    compatible = compatibility(memory.geometry)
    return await open_transports(names, "reader", compatible, memory, network, SystemClock())


def _table(tokens: int, geometry: PoolGeometry) -> list[int]:
    return [block % geometry.blocks for block in range(-(-tokens // geometry.block_size))]


class _Source:
    """In the other process."""

    def __init__(self, setup: ProbeSetup) -> None:
        self._geometry = setup.geometry
        self._network = lock_network(lock_from_state(setup.lock))
        memory = new_pool(setup.geometry)
        self.nixl_obstacle = "" if setup.with_nixl else "not asked for"
        self._nixl: NixlSource | None = None
        if setup.with_nixl:
            try:
                self._nixl = NixlSource("probe", memory)
            except TransportUnavailable as error:
                self.nixl_obstacle = error.message
        clock = SystemClock()
        self._leases = LeaseTable(clock, _PULL_WAIT_S, lambda name, how: None, memory.generation)
        self._kv = KvServer(
            self._leases,
            memory,
            compatibility(setup.geometry),
            lambda epoch: epoch == _EPOCH,
            clock,
            _PULL_WAIT_S,
            lend_cached=lambda lease, token_ids, salt: None,
            nixl=self._nixl,
        )

    async def serve(self) -> str:
        server = self._network.new_server()
        serve_kv(self._kv, server)
        address = f"127.0.0.1:{self._network.listen(server, '127.0.0.1', 0)}"
        await server.start()
        self._server = server
        return address

    async def pretend(self, prefill: Prefill) -> None:
        lease = self._leases.open(prefill.transfer_id, prefill.tokens)
        table = _table(prefill.tokens, self._geometry)
        lease.admitted(table, cached_tokens=0, queue_ms=0.0)
        started_s = time.monotonic()
        step = prefill.chunk_tokens or prefill.tokens
        for number, computed in enumerate(range(step, prefill.tokens + step, step), start=1):
            await asyncio.sleep(started_s + number * prefill.chunk_ms / 1e3 - time.monotonic())
            lease.advanced(min(computed, prefill.tokens), table)
        lease.finished(FirstToken(0, 1, None), time.monotonic())


async def _main() -> None:
    keep_freed_memory()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    source = _Source(msgspec.json.decode(await reader.readline(), type=ProbeSetup))
    address = await source.serve()
    sys.stdout.buffer.write(msgspec.json.encode(ProbeReady(address, source.nixl_obstacle)) + b"\n")
    sys.stdout.flush()
    running: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        task = asyncio.create_task(source.pretend(msgspec.json.decode(line, type=Prefill)))
        running.add(task)
        task.add_done_callback(running.discard)


if __name__ == "__main__":
    asyncio.run(_main())
