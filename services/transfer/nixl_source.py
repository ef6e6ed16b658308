"""The source's side of NIXL: our pool, open to one-sided reads of other workers."""

import msgspec

from services.transfer.nixl_agent import NixlAgent
from services.transfer.nixl_reach import Reach, reach_from_here
from services.transfer.nixl_reader import RemotePool
from services.transfer.pool_memory import PoolMemory
from services.transfer.protocol import PullOrder


class NixlSource:
    """Its agent is never replaced, unlike a reader's: nobody writes into our memory through it."""

    def __init__(self, worker_id: str, memory: PoolMemory, reach: Reach | None = None) -> None:
        """Raises TransportUnavailable. Takes up to a second: UCX looks for devices."""
        self._agent = NixlAgent(worker_id, memory.pool)
        self._reach = reach or reach_from_here()
        self._block_size = memory.block_size
        pool = RemotePool(self._agent.metadata(), self._agent.address, self._agent.bytes)
        self.pool = msgspec.msgpack.encode(pool)

    def obstacle(self, order: PullOrder) -> str:
        """Why this reader cannot read here one-sidedly, or nothing."""
        theirs = order.compatibility.block_size
        if theirs != self._block_size:
            return f"block sizes differ: {self._block_size} != {theirs}"
        return self._reach.obstacle(order.reach) if order.reach else "the reader does not say where it is"

    def close(self) -> None:
        self._agent.close()
