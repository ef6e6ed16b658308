"""ModelRunner: the seam between the engine and whatever computes.

The torch implementation is `services.engine.device.torch_runner`. `ArithmeticRunner` is the
in-memory twin: a token's KV is the token itself and the next token a checksum of all tokens before
it, read back through the block table. A fault in scheduling, prefix reuse, forking or transfer therefore
changes its tokens, just as it would change a model's.
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
    choice: int = 0  # which of a prompt's answers; each has noise of its own


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a batch: compute the KV of `tokens`, the first at position `start`."""

    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]  # block ids that cover positions [0, start + len(tokens))
    samples: Sequence[Sample]  # of the token that comes next; none: a chunk that is not the prompt's last


class ModelRunner(Protocol):
    def run(self, rows: Sequence[Row]) -> list[list[int]]:
        """Write the rows' KV into the pool; return each row's sampled tokens, one per sample.

        All KV writes of the batch are visible to readers of the pool when this returns.
        """
        ...

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of the pool: (from, to) each. No block is the target of two copies, or both
        source and target."""
        ...


class ArithmeticRunner:
    """The in-memory twin. Its pool is a writable buffer with PoolGeometry(layers=1, kv_heads=1,
    head_dim=1, dtype="float32"): per token four bytes of k, the token id, and four of v, its negative."""

    def __init__(self, geometry: PoolGeometry, pool: memoryview, vocab: int = 50_000) -> None:
        self._block_size = geometry.block_size
        self._slots = pool.cast("B").cast("i")  # 2 * block_size per block: k, then v
        self._vocab = vocab

    def run(self, rows: Sequence[Row]) -> list[list[int]]:
        for row in rows:
            for offset, token in enumerate(row.tokens):
                slot = self._slot(row, row.start + offset)
                self._slots[slot], self._slots[slot + self._block_size] = token, -token
        return [[self._next_token(row, sample) for sample in row.samples] for row in rows]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        size = 2 * self._block_size
        for source, target in copies:
            block = self._slots[source * size : (source + 1) * size]
            self._slots[target * size : (target + 1) * size] = block

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
        index = len(sample.output_ids)
        return arithmetic_token(keys, values, sample.params, index, self._vocab, sample.choice)


def arithmetic_token(
    keys: int, values: int, params: SamplingParams, index: int, vocab: int, choice: int = 0
) -> int:
    """The `index`-th token of an answer, from the checksums (CRC-32 of int32) of all k and all v before
    it. Greedy, it depends on nothing else; sampled, on seed, index and choice too."""
    noise = hash((params.seed, index, choice)) if params.temperature else 0
    return (keys ^ values * 31 ^ noise) % vocab
