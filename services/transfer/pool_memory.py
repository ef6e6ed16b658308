"""The KV pool as bytes: what a transfer reads and writes. Blocks are contiguous (PoolGeometry)."""

from collections.abc import Sequence

from services.model.pool_geometry import PoolGeometry


class PoolMemory:
    def __init__(self, geometry: PoolGeometry, memory: memoryview) -> None:
        assert memory.nbytes >= geometry.bytes, "the memory is smaller than the pool"
        self.block_size = geometry.block_size
        self.block_bytes = geometry.block_bytes
        self._memory = memory

    def read(self, blocks: Sequence[int]) -> bytes:
        """A copy of whole blocks, one after the other."""
        size = self.block_bytes
        return b"".join(self._memory[block * size : (block + 1) * size] for block in blocks)

    def write(self, blocks: Sequence[int], payload: bytes) -> None:
        """Put whole blocks in place; `payload` holds exactly `blocks`."""
        size = self.block_bytes
        assert len(payload) == len(blocks) * size, "the payload does not fit the blocks"
        source = memoryview(payload)
        for index, block in enumerate(blocks):
            self._memory[block * size : (block + 1) * size] = source[index * size : (index + 1) * size]
