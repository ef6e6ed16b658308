"""The shape of a worker's KV pool. Memory is block-major:

    [block][layer][k|v][kv_head][token][dim]

so one block is one contiguous range of bytes, on the wire as in memory.
"""

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    def block_bytes(self) -> int:
        values = self.layers * 2 * self.kv_heads * self.block_size * self.head_dim
        return values * DTYPE_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def layout(self) -> str:
        """Name of the memory layout, for Compatibility."""
        return f"block-major/{self.layers}x2x{self.kv_heads}x{self.head_dim}"
