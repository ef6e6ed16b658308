"""The gateway's side of a worker: a seam with a gRPC implementation and an in-memory twin.

Both calls belong to one attempt of one request. Whoever closes or cancels a call cancels the work on
the worker at once; a call that ends by itself has left nothing behind.
"""

from collections.abc import Callable, Collection
from typing import Protocol

import msgspec

from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.core.sampling import FinishReason, SamplingParams
from services.core.worker_report import WorkerReport


class PrefixSource(msgspec.Struct, frozen=True):
    """A worker that is believed to have the KV of the first `tokens` tokens in its cache."""

    worker: WorkerReport
    tokens: int


class Sequence(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt of one request. `output_ids` are the tokens that earlier attempts delivered."""

    request_id: str  # unique in the cluster
    attempt: int
    prompt_ids: list[int]
    output_ids: list[int]
    sampling: SamplingParams
    salt: str = ""
    choices: tuple[int, ...] = (0,)  # which of the request's choices it serves
    prefix: PrefixSource | None = None  # where the worker that computes the prompt may fetch a part of it

    @property
    def known_tokens(self) -> int:
        """Tokens whose KV the next one needs."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def tokens_left(self) -> int:
        return self.sampling.max_tokens - len(self.output_ids)


class OutputToken(msgspec.Struct, frozen=True):
    index: int  # position in the answer, from 0
    token: int
    finish: FinishReason | None = None
    choice: int = 0
    logprobs: TokenLogprobs | None = None


class PrefillResult(msgspec.Struct, frozen=True):
    firsts: tuple[OutputToken, ...]  # one of each choice
    cached_tokens: int  # of the known tokens, found in the worker's prefix cache
    queue_ms: float
    compute_ms: float
    fetched_tokens: int = 0  # from another worker's prefix cache
    fetch_ms: float = 0.0
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()  # parts, in order


class Reserved(msgspec.Struct, frozen=True):
    """A decode worker has room for the sequence; its KV is on its way."""


class Started(msgspec.Struct, frozen=True):
    """A decode worker has the KV, or room to compute it; its tokens follow."""

    cached_tokens: int  # of the known tokens, found in the worker's prefix cache
    queue_ms: float  # waited for KV blocks
    transferred_bytes: int
    transfer_ms: float  # from the pull's opening to the confirmed lease
    exposed_ms: float  # the part of it after the prefill's end
    fetched_tokens: int = 0  # from another worker's prefix cache
    fetch_ms: float = 0.0


DecodeEvent = Reserved | Started | PromptLogprobs | OutputToken


class WorkerClient(Protocol):
    async def prefill(self, worker: WorkerReport, sequence: Sequence, *, expect_pull: bool) -> PrefillResult:
        """The first tokens. With `expect_pull` the KV is kept for the decode worker that pulls it."""
        ...

    async def decode(
        self,
        worker: WorkerReport,
        sequence: Sequence,
        source: WorkerReport | None,
        deliver: Callable[[DecodeEvent], None],
    ) -> None:
        """Perhaps Reserved, then Started, then the tokens, each handed to `deliver` as it comes. Returns
        after each choice's one with a finish reason.

        With a `source` the KV is pulled from there and the first tokens of the attempt are not repeated;
        without, the worker computes the prompt itself. Raises the error that the worker reported, or
        WorkerLost.
        """
        ...

    def end_choice(self, worker: WorkerReport, sequence: Sequence, choice: int) -> None:
        """Nobody wants more of one choice of a running `decode`; the others go on. Does not wait."""
        ...

    async def keep_only(self, live: Collection[WorkerReport]) -> None:
        """Drop connections to all other workers; calls still open there end with WorkerLost."""
        ...

    async def close(self) -> None: ...
