"""ModelRunner: the seam between the engine and whatever computes.

The torch implementation is `services.engine.device.torch_runner`. `ArithmeticRunner` is the
in-memory twin: a token's KV is the token itself and the next token a hash of all tokens before it,
read back through the block table. A fault in scheduling, prefix reuse or transfer therefore changes
its tokens, just as it would change a model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.core.sampling import SamplingParams
from services.model.pool_geometry import PoolGeometry


@dataclass(frozen=True, slots=True)
class Sample:
    """What the sampler needs for one row, besides the logits."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]  # the sampled token becomes output_ids[len(output_ids)]


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a batch: compute the KV of `tokens`, the first at position `start`."""

    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]  # block ids that cover positions [0, start + len(tokens))
    sample: Sample | None  # None: a prefill chunk that is not the prompt's last


class ModelRunner(Protocol):
    def run(self, rows: Sequence[Row]) -> list[int | None]:
        """Write the rows' KV into the pool; return one sampled token per row (None without sample).

        All KV writes of the batch are visible to readers of the pool when this returns.
        """
        ...


class ArithmeticRunner:
    """The in-memory twin. Its pool is a writable buffer with PoolGeometry(layers=1, kv_heads=1,
    head_dim=1, dtype="float32"): four bytes per token, which hold the token id."""

    def __init__(self, geometry: PoolGeometry, pool: memoryview, vocab: int = 50_000) -> None:
        self._block_size = geometry.block_size
        self._slots = pool.cast("B").cast("i")  # 2 * block_size per block: k, then v (unused)
        self._vocab = vocab

    def run(self, rows: Sequence[Row]) -> list[int | None]:
        for row in rows:
            for offset, token in enumerate(row.tokens):
                self._slots[self._slot(row, row.start + offset)] = token
        return [self._next_token(row) if row.sample else None for row in rows]

    def _slot(self, row: Row, position: int) -> int:
        block = row.block_table[position // self._block_size]
        return 2 * block * self._block_size + position % self._block_size

    def _next_token(self, row: Row) -> int:
        value = 17
        for position in range(row.start + len(row.tokens)):
            value = (value * 31 + self._slots[self._slot(row, position)] + 7) % 2_147_483_647
        return value % self._vocab
