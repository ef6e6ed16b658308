"""The KV pool as bytes: what a transfer reads and writes. Blocks are contiguous (PoolGeometry)."""

from collections.abc import Sequence

import numpy as np

from services.model.pool_geometry import SCALE_BYTES, PoolGeometry


class PoolMemory:
    def __init__(self, geometry: PoolGeometry, memory: memoryview) -> None:
        """`memory` is what the worker's two processes share: the pool and the blocks' generations."""
        assert memory.nbytes >= geometry.shared_bytes, "the memory is smaller than the pool"
        self.geometry = geometry
        self.block_size = geometry.block_size
        self.block_bytes = geometry.block_bytes
        self._memory = memory
        self._generations = geometry.generations(memory)

    @property
    def pool(self) -> memoryview:
        """The blocks alone."""
        return self._memory[: self.geometry.bytes]

    def generation(self, block: int) -> int:
        """Raised by the engine whenever the block is handed out for new content."""
        return self._generations[block]

    def read(self, blocks: Sequence[int]) -> bytes:
        """A copy of whole blocks, one after the other."""
        size = self.block_bytes
        return b"".join(self._memory[block * size : (block + 1) * size] for block in blocks)

    def write(self, blocks: Sequence[int], payload: bytes | memoryview) -> None:
        """Put whole blocks in place; `payload` holds exactly `blocks`."""
        size = self.block_bytes
        assert len(payload) == len(blocks) * size, "the payload does not fit the blocks"
        source = memoryview(payload)
        for index, block in enumerate(blocks):
            self._memory[block * size : (block + 1) * size] = source[index * size : (index + 1) * size]

    def write_recut(
        self,
        block_ids: Sequence[int],
        start: int,
        end: int,
        payload: bytes | memoryview,
        first_token: int,
        block_size: int,
    ) -> None:
        """Put the tokens [start, end) in place from blocks of another size.

        `block_ids` are the blocks of the sequence from its first token on. `payload` holds whole blocks
        of `block_size` tokens, the first of which begins at `first_token`.
        """
        parts = list(
            zip(self._by_token(payload, block_size), self._by_token(self.pool, self.block_size), strict=True)
        )
        while start < end:
            theirs, their_offset = divmod(start - first_token, block_size)
            index, offset = divmod(start, self.block_size)
            count = min(block_size - their_offset, self.block_size - offset, end - start)
            for source, ours in parts:
                piece = source[theirs, ..., their_offset : their_offset + count, :]
                ours[block_ids[index], ..., offset : offset + count, :] = piece
            start += count

    def _by_token(self, memory: bytes | memoryview, block_size: int) -> list[np.ndarray]:
        """All of it as arrays [block][...][token][byte]; no copy."""
        geometry = self.geometry
        heads = (geometry.layers, 2, geometry.kv_heads)
        rows = np.frombuffer(memory, np.uint8).reshape(-1, *heads, block_size * geometry.row_token_bytes)
        if geometry.dtype != "int8":
            return [rows.reshape(-1, *heads, block_size, geometry.row_token_bytes)]
        width = geometry.row_token_bytes - SCALE_BYTES
        codes, scales = rows[..., : block_size * width], rows[..., block_size * width :]
        k, v = codes[:, :, 0], codes[:, :, 1]
        return [
            k.reshape(*k.shape[:-1], width // 4, block_size, 4),
            v.reshape(*v.shape[:-1], block_size, width),
            scales.reshape(*scales.shape[:-1], block_size, SCALE_BYTES),
        ]
