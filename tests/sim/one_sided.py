"""One-sided reads between simulated workers: what NIXL does, without NIXL.

A read copies bytes of the source's memory a piece at a time, while the source goes on; it needs no word
of the source's process, so it succeeds although that is stopped, and brings whatever is there. It fails
when the process is gone or the link is cut. Like NixlReader, it ends only when it writes nothing more.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from services.core.block_hash import Compatibility
from services.core.clock import Clock
from services.core.errors import KvLinkLost
from services.transfer.ahead import until_done
from services.transfer.grpc_transport import GrpcKvTransport
from services.transfer.nixl_agent import Range
from services.transfer.nixl_reach import Reach
from services.transfer.nixl_reader import RemotePool
from services.transfer.nixl_transport import NixlKvTransport
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import PullOrder
from services.wire.channel import Network
from services.worker.transports import KvTransports
from tests.sim.loop import Process
from tests.sim.network import SimNetwork

_PIECE_S = (0.0001, 0.004)  # to copy one range
_FAILS_AFTER_S = 0.5
_HERE = Reach("the simulated machine", rdma=False)


@dataclass(slots=True)
class SharedMemory:
    """The registered pools of a cluster, by what stands for NIXL's metadata."""

    network: SimNetwork
    rng: random.Random
    reads: int = 0
    _pools: list[tuple[Process, memoryview]] = field(default_factory=list)

    def register(self, process: Process, pool: memoryview) -> bytes:
        self._pools.append((process, pool))
        return str(len(self._pools) - 1).encode()

    def pool(self, metadata: bytes) -> tuple[Process, memoryview]:
        return self._pools[int(metadata)]

    async def open(
        self,
        process: Process,
        before_write: Callable[[int, int], None],
        names: list[str],
        worker_id: str,
        compatibility: Compatibility,
        memory: PoolMemory,
        network: Network,
        clock: Clock,
    ) -> KvTransports:
        """services.worker.transports.open_transports, for one simulated worker. `before_write(start, end)`
        hears which bytes of its pool a read is about to write."""
        grpc = GrpcKvTransport(compatibility, network)
        if "nixl" not in names:
            return KvTransports(grpc, None)
        reader = _Reader(self, process, memory.pool, before_write)
        reading = NixlKvTransport(grpc, reader, names, clock, _HERE)  # type: ignore[arg-type]
        return KvTransports(reading, _Source(self.register(process, memory.pool), memory))  # type: ignore[arg-type]


class _Reader:
    """NixlReader's part."""

    def __init__(
        self,
        shared: SharedMemory,
        process: Process,
        memory: memoryview,
        before_write: Callable[[int, int], None],
    ) -> None:
        self._shared, self._process, self._memory = shared, process, memory
        self._before_write = before_write
        self._copying: set[asyncio.Task[None]] = set()

    async def read(self, worker_id: str, pool: RemotePool, ranges: Sequence[Range]) -> None:
        copying = asyncio.create_task(self._copy(pool, ranges))
        self._copying.add(copying)
        copying.add_done_callback(self._copying.discard)
        try:
            await asyncio.shield(copying)
        except asyncio.CancelledError:
            await until_done(copying)  # what has begun cannot be called back
            raise

    async def close(self) -> None:
        if self._copying:
            await asyncio.wait(self._copying)

    async def _copy(self, pool: RemotePool, ranges: Sequence[Range]) -> None:
        source, memory = self._shared.pool(pool.metadata)
        self._shared.reads += 1
        for one in ranges:
            await asyncio.sleep(self._shared.rng.uniform(*_PIECE_S))
            if source.dead or self._shared.network.link(source.name, self._process.name).cut:
                await asyncio.sleep(_FAILS_AFTER_S)
                raise KvLinkLost(f"the simulated read from {source.name} failed")
            if not self._process.dead:
                self._before_write(one.local, one.local_end)
                self._memory[one.local : one.local_end] = memory[one.remote : one.remote_end]


class _Source:
    """NixlSource's part."""

    def __init__(self, metadata: bytes, memory: PoolMemory) -> None:
        self.pool = msgspec.msgpack.encode(RemotePool(metadata, 0, len(memory.pool)))
        self._block_size = memory.block_size

    def obstacle(self, order: PullOrder) -> str:
        return "" if order.compatibility.block_size == self._block_size else "block sizes differ"

    def close(self) -> None:
        pass
