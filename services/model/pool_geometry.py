"""The shape of a worker's KV pool. Memory is block-major:

    [block][layer][k|v][kv_head][token][dim]

so one block is one contiguous range of bytes, on the wire as in memory. In the memory that a worker's
two processes share, one uint64 per block follows the pool: its generation, raised at every reuse.
"""

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GENERATION_BYTES = 8


@dataclass(frozen=True, slots=True)
class PoolGeometry:
    blocks: int
    layers: int
    kv_heads: int
    block_size: int  # tokens
    head_dim: int
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        return (self.blocks, self.layers, 2, self.kv_heads, self.block_size, self.head_dim)

    @property
    def rows(self) -> int:
        """Rows of a block: its (layer, k or v, head) combinations, each with block_size tokens."""
        return self.layers * 2 * self.kv_heads

    @property
    def row_token_bytes(self) -> int:
        """Bytes of one token in one row."""
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.rows * self.block_size * self.row_token_bytes

    @property
    def bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def generations_offset(self) -> int:
        """Where the generations begin in the shared memory: behind the pool, aligned."""
        return -(-self.bytes // GENERATION_BYTES) * GENERATION_BYTES

    @property
    def shared_bytes(self) -> int:
        return self.generations_offset + self.blocks * GENERATION_BYTES

    def generations(self, shared: memoryview) -> "memoryview[int]":
        """The blocks' generations in the shared memory."""
        start = self.generations_offset
        return shared[start : start + self.blocks * GENERATION_BYTES].cast("Q")

    @property
    def layout(self) -> str:
        """Name of the memory layout, for Compatibility."""
        return f"block-major/{self.layers}x2x{self.kv_heads}x{self.head_dim}"
