"""KvTransport: the seam between a decode worker and wherever its KV comes from.

source   KvServer.pull   ->  KvHeader, KvChunk, KvChunk, ...      (what travels)
reader   KvTransport.pull -> Arrived, Arrived, ...                (what is in place)
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.core.block_hash import Compatibility
from services.core.logprobs import TokenLogprobs
from services.core.sampling import FinishReason
from services.transfer.destination import Destination
from services.transfer.nixl_reach import Reach

TRANSPORTS = ("nixl", "grpc")  # the best first


@dataclass(frozen=True, slots=True)
class KvSource:
    """The incarnation of the prefill worker that computes a prompt."""

    worker_id: str
    address: str
    epoch: int


_LOAN_SUFFIX = "/prefix"


def loan_id(seq_id: str) -> str:
    """The transfer in which a sequence fetches a prefix."""
    return seq_id + _LOAN_SUFFIX


def is_loan_id(transfer_id: str) -> bool:
    """Never true of an attempt, which ends with its number: a loan must not pass for one."""
    return transfer_id.endswith(_LOAN_SUFFIX)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The token that the prefill sampled for one choice."""

    index: int  # position in the answer; above 0 when a stream is resumed
    token: int
    finish: FinishReason | None
    choice: int = 0
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PullOrder:
    """What a reader asks a source for."""

    transfer_id: str
    first_token: int  # the reader holds everything before
    epoch: int  # of the source the gateway chose
    compatibility: Compatibility  # the reader's
    transports: Sequence[str] = ("grpc",)  # that the reader has, best first
    reach: Reach | None = None  # the reader's, if "nixl" is one of them


class NixlOffer(Protocol):
    """What a source that may be read over NIXL has (NixlSource)."""

    @property
    def pool(self) -> bytes: ...

    def obstacle(self, order: PullOrder) -> str:
        """Why this reader cannot read here one-sidedly, or nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LendOrder:
    """Leading tokens whose KV a reader hopes to find in a source's cache."""

    transfer_id: str
    token_ids: Sequence[int]
    salt: str
    epoch: int  # of the source the gateway chose
    compatibility: Compatibility  # the reader's


@dataclass(frozen=True, slots=True)
class KvHeader:
    """What a reader must know before the first chunk."""

    block_size: int  # tokens in a block of the source
    nixl_pool: bytes = b""  # if chunks have references: the source's pool, see NixlSource
    obstacle: str = ""  # if they have payloads although the reader prefers NIXL: why


@dataclass(frozen=True, slots=True)
class KvChunk:
    """The KV of `tokens` tokens from `first_token` on, as whole blocks of the source: their bytes, or
    where the reader finds them."""

    first_token: int  # a multiple of the source's block size
    tokens: int
    payload: bytes | memoryview = b""
    firsts: tuple[FirstToken, ...] = ()  # in the last chunk of a prefill only: one of each choice
    exposed_ms: float = 0.0  # in the last chunk only: from the end of the prefill to its sending
    blocks: Sequence[int] = ()  # instead of a payload: where they are in the source's pool

    @property
    def end(self) -> int:
        return self.first_token + self.tokens


@dataclass(frozen=True, slots=True)
class Arrived:
    """KV that is in its place: `tokens` tokens from `first_token` on."""

    first_token: int
    tokens: int
    bytes: int  # that travelled for it
    # Right whatever becomes of the lease: the checksum held, and so did the lease when it was sent.
    proven: bool
    firsts: tuple[FirstToken, ...] = ()  # in the last one only: one of each choice
    exposed_ms: float = 0.0  # in the last one only: from the end of the prefill to its sending


class KvTransport(Protocol):
    def pull(
        self, source: KvSource, transfer_id: str, destination: Destination, first_token: int
    ) -> AsyncGenerator[Arrived, None]:
        """Put the KV of a prompt from `first_token` on into its place, while it is computed, or that of a
        lent prefix. The last value has `firsts` if there was a prefill. Once the generator is closed,
        nothing of it writes to the destination any more.

        Raises KvLinkLost or KvCorrupt, after which another pull may succeed; KvSourceLost (source dead,
        restarted, or without this transfer), KvStale or Incompatible, after which none will.
        """
        ...

    async def lend(self, source: KvSource, transfer_id: str, token_ids: Sequence[int], salt: str) -> int:
        """Ask a source to keep the cached KV of leading tokens for a pull; of how many it does.

        Raises KvSourceLost (it has none of it any more, or has restarted), Overloaded, KvLinkLost or
        Incompatible.
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
