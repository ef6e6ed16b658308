"""The shape of a worker's KV pool. Memory is block-major:

    [block][layer][k|v][kv_head][token][dim]

so one block is one contiguous range of bytes, on the wire as in memory. A row of int8 (the tokens of one
head's k or v) holds codes of one byte, the head's dimensions filled up to fours, and then a float32 scale
for each token:

    k  [dim / 4][token][4], scales [token]        v  [token][dim], scales [token]

In the memory that a worker's two processes share, one uint64 per block follows the pool: its generation,
raised at every reuse.
"""

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
SCALE_BYTES = 4
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
        """Of the pool in numbers of its dtype. The last two axes of int8 are not [token][dim] but a row's
        bytes, as many as all its tokens take."""
        last = self.row_token_bytes // DTYPE_BYTES[self.dtype]
        return (self.blocks, self.layers, 2, self.kv_heads, self.block_size, last)

    @property
    def rows(self) -> int:
        """Rows of a block: its (layer, k or v, head) combinations, each with block_size tokens."""
        return self.layers * 2 * self.kv_heads

    @property
    def row_token_bytes(self) -> int:
        """Bytes of one token in one row."""
        if self.dtype == "int8":
            return -(-self.head_dim // 4) * 4 + SCALE_BYTES
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
