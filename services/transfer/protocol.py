"""KvTransport: the seam between a decode worker and wherever its KV comes from."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from services.core.sampling import FinishReason


@dataclass(frozen=True, slots=True)
class KvSource:
    """The incarnation of the prefill worker that computes a prompt."""

    worker_id: str
    address: str
    epoch: int


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The token that the prefill sampled."""

    index: int  # position in the answer; above 0 when a stream is resumed
    token: int
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class KvChunk:
    """The KV of `tokens` tokens from `first_token` on, as whole blocks whose checksum held."""

    first_token: int
    tokens: int
    payload: bytes
    first: FirstToken | None = None  # in the last chunk only
    exposed_ms: float = 0.0  # in the last chunk only: from the end of the prefill to its sending


class KvTransport(Protocol):
    def pull(self, source: KvSource, transfer_id: str, first_token: int) -> AsyncGenerator[KvChunk, None]:
        """Stream the KV of a prompt from `first_token` on, while it is computed. The last chunk has `first`.

        Raises KvSourceLost (source dead, restarted, or without this transfer), KvCorrupt, Incompatible.
        """
        ...

    async def release(self, source: KvSource, transfer_id: str) -> bool:
        """End the lease. True: it was held until now, so what was pulled is valid."""
        ...

    def abandon(self, source: KvSource, transfer_id: str) -> None:
        """Tell the source, without waiting, that nobody will read on: it need not keep the blocks for
        the rest of the lease. Best effort."""
        ...

    async def close(self) -> None: ...
