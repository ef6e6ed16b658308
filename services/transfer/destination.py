"""Where the KV of one sequence belongs on the worker that reads it."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.core.errors import KvCorrupt
from services.transfer.pool_memory import PoolMemory


@dataclass(frozen=True, slots=True)
class Destination:
    memory: PoolMemory
    block_ids: Sequence[int]  # from the sequence's first token on
    tokens: int  # all of them
    held_tokens: int  # the leading ones that are here already; a multiple of the block size

    def place(
        self, first_token: int, tokens: int, payload: bytes | memoryview, block_size: int, after: int
    ) -> int:
        """Copy the KV of `tokens` tokens from `first_token` on out of whole blocks of `block_size` tokens.

        Those before `after` are in place already and stay as they are: their blocks may be shared.
        Returns the first token that was copied. Raises KvCorrupt if the payload is not what it says.
        """
        if tokens == 0:  # the message that ends a transfer
            return first_token
        end = first_token + tokens
        start = min(max(first_token, after), end)
        self._check(first_token, end, payload, block_size)
        if block_size != self.memory.block_size:
            self.memory.write_recut(self.block_ids, start, end, payload, first_token, block_size)
        elif start < end:
            skipped = (start - first_token) // block_size
            blocks = self.block_ids[first_token // block_size + skipped : -(-end // block_size)]
            self.memory.write(blocks, memoryview(payload)[skipped * self.memory.block_bytes :])
        return start

    def _check(self, first_token: int, end: int, payload: bytes | memoryview, block_size: int) -> None:
        geometry = self.memory.geometry
        blocks = -(-(end - first_token) // block_size)
        expected = blocks * block_size * geometry.rows * geometry.row_token_bytes
        if end > self.tokens or first_token % block_size or len(payload) != expected:
            raise KvCorrupt(
                f"a chunk of {end - first_token} tokens at {first_token} with {len(payload)} bytes does not "
                f"fit blocks of {block_size} tokens ({expected} bytes) or the sequence's {self.tokens} tokens"
            )
