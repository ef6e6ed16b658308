"""ModelRunner: the seam between the engine and whatever computes.

The torch implementation is `services.engine.device.torch_runner`. `ArithmeticRunner` is the
in-memory twin: a token's KV is the token itself and the next token, like its logprobs, a checksum of
all tokens before it, read back through the block table. A fault in scheduling, prefix reuse, forking or
transfer therefore changes its tokens, just as it would change a model's.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.core.sampling import SamplingParams
from services.model.pool_geometry import PoolGeometry


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Sample:
    """What the sampler needs for one row, besides the logits. One choice of a sequence has the same one in
    all its steps, so a runner may keep what it knows of the answer with it."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]  # the sampled token becomes output_ids[len(output_ids)]
    choice: int = 0  # which of a prompt's answers; each has noise of its own


@dataclass(frozen=True, slots=True)
class Targets:
    """Known tokens whose logprobs are wanted; a row computes the tokens before each of them."""

    first: int  # position of the first one
    ids: Sequence[int]
    top: int  # how many of the most probable ones are wanted as well


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a batch: compute the KV of `tokens`, the first at position `start`."""

    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]  # block ids that cover positions [0, start + len(tokens))
    samples: Sequence[Sample]  # of the token that comes next; none: a chunk that is not the prompt's last
    targets: Targets | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model says after one row."""

    tokens: list[int]  # one per sample
    logprobs: list[TokenLogprobs | None]  # of these tokens, where the sample's parameters ask for them
    scored: PromptLogprobs | None = None  # of the row's targets
    complete: set[int] = field(default_factory=set)  # samples that end here: no more fits their grammar
    failures: dict[int, str] = field(default_factory=dict)  # samples that no token may follow, and why


class ModelRunner(Protocol):
    def prepare(self, params: SamplingParams) -> bool:
        """Whether all is there to sample with `params`; if not, it is being made. Raises BadRequest if it
        cannot be made."""
        ...

    def run(self, rows: Sequence[Row]) -> list[Outcome]:
        """Write the rows' KV into the pool; one outcome for each of them.

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

    def prepare(self, params: SamplingParams) -> bool:
        """Its answers follow no grammar."""
        return True

    def run(self, rows: Sequence[Row]) -> list[Outcome]:
        for row in rows:
            for offset, token in enumerate(row.tokens):
                slot = self._slot(row, row.start + offset)
                self._slots[slot], self._slots[slot + self._block_size] = token, -token
        return [self._outcome(row) for row in rows]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        size = 2 * self._block_size
        for source, target in copies:
            block = self._slots[source * size : (source + 1) * size]
            self._slots[target * size : (target + 1) * size] = block

    def _slot(self, row: Row, position: int) -> int:
        block = row.block_table[position // self._block_size]
        return 2 * block * self._block_size + position % self._block_size

    def _outcome(self, row: Row) -> Outcome:
        keys, values = self._checksums(row, row.start + len(row.tokens)) if row.samples else (0, 0)
        tokens = [
            arithmetic_token(keys, values, s.params, len(s.output_ids), self._vocab, s.choice)
            for s in row.samples
        ]
        logprobs = [
            None if s.params.top_logprobs is None else self._logprobs(keys, token, s.params.top_logprobs)
            for s, token in zip(row.samples, tokens, strict=True)
        ]
        return Outcome(tokens, logprobs, self._scored(row, row.targets) if row.targets else None)

    def _checksums(self, row: Row, known: int) -> tuple[int, int]:
        """Of the keys and the values of the `known` leading tokens."""
        keys = values = 0
        for position in range(0, known, self._block_size):
            tokens = min(self._block_size, known - position)
            k = self._slot(row, position)
            v = k + self._block_size
            keys = zlib.crc32(self._slots[k : k + tokens], keys)
            values = zlib.crc32(self._slots[v : v + tokens], values)
        return keys, values

    def _logprobs(self, keys: int, token: int, top: int) -> TokenLogprobs:
        best = [(keys + place) % self._vocab for place in range(top)]
        rank = 1 + (keys ^ token) % self._vocab
        return TokenLogprobs(-rank / 8, rank, tuple(best), tuple(-(n + 1) / 8 for n in range(top)))

    def _scored(self, row: Row, targets: Targets) -> PromptLogprobs:
        tokens = [
            self._logprobs(self._checksums(row, targets.first + place)[0], token, targets.top)
            for place, token in enumerate(targets.ids)
        ]
        return PromptLogprobs.of(targets.first, targets.top, tokens)


def arithmetic_token(
    keys: int, values: int, params: SamplingParams, index: int, vocab: int, choice: int = 0
) -> int:
    """The `index`-th token of an answer, from the checksums (CRC-32 of int32) of all k and all v before
    it. Greedy, it depends on nothing else; sampled, on seed, index and choice too."""
    noise = hash((params.seed, index, choice)) if params.temperature else 0
    return (keys ^ values * 31 ^ noise) % vocab
