"""What a worker tells the cluster about itself (the value that membership carries)."""

from typing import Literal, NamedTuple
from zlib import crc32

import msgspec

from router.step_model import StepModel
from services.core.block_hash import Compatibility

Role = Literal["prefill", "decode", "both"]
Part = Literal["prefill", "decode"]  # of a request: what a role lets a worker do
# ready: takes work. stalled: its engine is overdue, may come back. draining: about to stop.
State = Literal["ready", "stalled", "draining"]


class WorkerKey(NamedTuple):
    """One incarnation of a worker. The epoch is a random 64-bit number, new at every start and whenever
    the worker has lost its lease (services/engine/incarnation.py)."""

    worker_id: str
    epoch: int


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    worker_id: str
    epoch: int
    role: Role
    state: State
    address: str  # host:port of its gRPC services
    metrics_url: str = ""
    served_model: str  # the name clients use
    compatibility: Compatibility
    context_tokens_max: int  # prompt + output a single request may use here
    blocks_total: int = 0
    blocks_free: int = 0  # neither used nor cached
    blocks_cached: int = 0  # reusable, evictable
    sequences_max: int = 0  # that may have blocks at the same time; 0: it does not say
    running: int = 0  # sequences with blocks
    waiting: int = 0  # sequences without blocks yet
    # Load in the terms of the step model (router/step_model.py): T and X of what is known but not computed
    # of all sequences, C of the sequences with blocks that decode or are about to.
    queued_prefill_tokens: int = 0
    queued_prefill_context: int = 0
    running_context: int = 0
    model: StepModel | None = None  # fitted to this worker's steps; None before the first one
    chunk_tokens_max: int = 0  # prompt tokens that one step computes at most; 0: it does not say
    load_age_ms: float = 0.0  # so long before the report the engine said what its load was: a step's time
    # The tags of the sequences it took last, which are part of its load: so a gateway knows which of those
    # that it sent are.
    newest: list[int] = []
    prefix_hit_tokens: int = 0  # totals since start
    prompt_tokens: int = 0
    beat: int = 0  # one more in every announcement of a process; 0: it does not count them

    @property
    def key(self) -> WorkerKey:
        return WorkerKey(self.worker_id, self.epoch)

    @property
    def prefills(self) -> bool:
        return has_part(self.role, "prefill")

    @property
    def decodes(self) -> bool:
        return has_part(self.role, "decode")


def sequence_tag(seq_id: str) -> int:
    """A short name of a sequence, for reports."""
    return crc32(seq_id.encode())


def has_part(role: Role, part: Part) -> bool:
    return role in (part, "both")
