"""ModelRunner: the seam between the engine and whatever computes.

The torch implementation is `services.engine.device.torch_runner`. `ArithmeticRunner` is the
in-memory twin: a token's KV is the token itself and the next token a checksum of all tokens before
it, read back through the block table. A fault in scheduling, prefix reuse or transfer therefore changes
its tokens, just as it would change a model's.
"""

import zlib
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
    head_dim=1, dtype="float32"): per token four bytes of k, the token id, and four of v, its negative."""

    def __init__(self, geometry: PoolGeometry, pool: memoryview, vocab: int = 50_000) -> None:
        self._block_size = geometry.block_size
        self._slots = pool.cast("B").cast("i")  # 2 * block_size per block: k, then v
        self._vocab = vocab

    def run(self, rows: Sequence[Row]) -> list[int | None]:
        for row in rows:
            for offset, token in enumerate(row.tokens):
                slot = self._slot(row, row.start + offset)
                self._slots[slot], self._slots[slot + self._block_size] = token, -token
        return [self._next_token(row, row.sample) if row.sample else None for row in rows]

    def _slot(self, row: Row, position: int) -> int:
        block = row.block_table[position // self._block_size]
        return 2 * block * self._block_size + position % self._block_size

    def _next_token(self, row: Row, sample: Sample) -> int:
        keys = values = 0
        known = row.start + len(row.tokens)
        for position in range(0, known, self._block_size):
            tokens = min(self._block_size, known - position)
            k = self._slot(row, position)
            v = k + self._block_size
            keys = zlib.crc32(self._slots[k : k + tokens], keys)
            values = zlib.crc32(self._slots[v : v + tokens], values)
        return arithmetic_token(keys, values, sample.params, len(sample.output_ids), self._vocab)


def arithmetic_token(keys: int, values: int, params: SamplingParams, index: int, vocab: int) -> int:
    """The `index`-th token of an answer, from the checksums (CRC-32 of int32) of all k and all v before
    it. Greedy, it depends on nothing else; sampled, on the seed and the index too."""
    noise = hash((params.seed, index)) if params.temperature else 0
    return (keys ^ values * 31 ^ noise) % vocab
