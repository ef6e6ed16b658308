"""What a worker's I/O process and its engine process say to each other: two closed unions.

The I/O process sends commands; the engine answers each turn with one Report. A sequence moves
through the engine like this, by the kind it was submitted as:

    local     Submit ── Admitted ── Scored* ── Token+ (the last one has a finish) ── gone
    prefill   Submit ── Admitted ── (Advanced | Scored)* ── Token  ── its blocks stay until Drop
    receive   Submit ── Admitted ── Landed* ── Start(first tokens) ── Token+ ── gone

    Lend ── Admitted (the cached leading blocks of a chain) ── they stay until Drop

A `local` or `prefill` sequence whose Submit has `fetch_tokens` and whose Admitted repeats it first waits
for KV from another worker: Landed* ── Fetched, then the engine computes what has not landed. Whoever
fetches must send Fetched, or Drop, once nothing writes to the blocks any more.

One Submit may ask for several choices: answers to one prompt, which is computed or received once. Each
choice has tokens and a finish of its own; the sequence is gone with its last choice.

Refused ends a sequence before Admitted. Drop ends any sequence at any time; its blocks are free (or
cached) once `dropped` reports it. Revoked asks for the reservation of a `receive` sequence back,
because running sequences need its blocks: they stay reserved until the Drop that answers it, since
KV may still be on its way into them. A Start that crosses a Revoked wins: the sequence runs. Failed says
that one choice has no next token; Drop answers it, too.
"""

from typing import Literal

import msgspec

from router.step_model import StepModel
from services.core.block_hash import ChainLink, Compatibility
from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.core.sampling import FinishReason, SamplingParams
from services.model.pool_geometry import PoolGeometry

Kind = Literal["local", "prefill", "receive"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    sequences_max: int  # that hold blocks
    waiting_max: int  # that do not yet; more are refused
    chunk_tokens_max: int  # prompt tokens of one step
    step_ms_target: float  # for steps in which decoding sequences wait for a prompt's chunk


class SharedCores(msgspec.Struct, frozen=True):
    """A worker's place among those that lend each other idle cores."""

    file: str  # of kernels.cpu.core_slots
    slot: int
    cores: int  # that there are for all of them


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """The first message: all that the engine process needs to know."""

    model: str  # path
    device: str
    threads: int
    geometry: PoolGeometry
    compatibility: Compatibility
    limits: Limits
    compiled: bool = False  # by torch
    cores: SharedCores | None = None  # that quantised steps compute on


class EngineReady(msgspec.Struct, frozen=True):
    """The engine's answer to the setup: it has loaded the model, or `error` says why not."""

    error: str = ""


class Submit(msgspec.Struct, frozen=True, tag=True):
    seq_id: str
    kind: Kind
    prompt_ids: list[int]
    output_ids: list[int]  # delivered by earlier attempts
    sampling: SamplingParams
    salt: str = ""
    choices: tuple[int, ...] = (0,)  # their numbers among all choices of the request
    fetch_tokens: int = 0  # leading tokens whose KV another worker is believed to have


class Lend(msgspec.Struct, frozen=True, tag=True):
    """Keep the cached leading blocks of `token_ids` for a reader on another worker, until Drop."""

    seq_id: str
    token_ids: list[int]
    salt: str


class Landed(msgspec.Struct, frozen=True, tag=True):
    """The KV of all tokens before `tokens` is in the pool; that of all before `proven` is known to be
    right without the confirmation of the lease, so it may stay as cache whatever comes."""

    seq_id: str
    tokens: int
    proven: int = 0


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """The fetch of a prefix has ended, well or not: compute what has not landed."""

    seq_id: str


class Start(msgspec.Struct, frozen=True, tag=True):
    """The lease is confirmed: decode from the tokens the prefill worker sampled."""

    seq_id: str
    tokens: dict[int, int]  # of the choices that go on


class Drop(msgspec.Struct, frozen=True, tag=True):
    seq_id: str


class DropChoice(msgspec.Struct, frozen=True, tag=True):
    """End one choice; the others go on. A reservation that nobody wants any more is ended by Drop."""

    seq_id: str
    choice: int


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Asks for a report, as a sign of life: the engine reads commands only between two steps."""


Command = Submit | Lend | Landed | Fetched | Start | Drop | DropChoice | Ping


class Admitted(msgspec.Struct, frozen=True):
    seq_id: str
    # Of a reservation: all its blocks, in order. Else those of the cached prefix, and of that to be fetched.
    block_ids: list[int]
    cached_tokens: int  # the leading part of the known tokens that was already computed
    queue_ms: float
    fetch_tokens: int = 0  # the sequence waits for the KV of all tokens before; 0: for nothing


class Refused(msgspec.Struct, frozen=True):
    seq_id: str
    code: str  # a label of core/errors.py
    message: str


class Advanced(msgspec.Struct, frozen=True):
    """The KV of all tokens before `computed` is final and may be read from `block_ids`."""

    seq_id: str
    computed: int
    block_ids: list[int]


class Token(msgspec.Struct, frozen=True):
    seq_id: str
    index: int  # position in the answer
    token: int
    finish: FinishReason | None
    choice: int = 0
    logprobs: TokenLogprobs | None = None


class Scored(msgspec.Struct, frozen=True):
    """How probable the next part of the prompt is; all of it comes before the first token."""

    seq_id: str
    logprobs: PromptLogprobs


class Revoked(msgspec.Struct, frozen=True):
    seq_id: str


class Failed(msgspec.Struct, frozen=True):
    """No token may follow in this choice. Nothing more is computed for it; the others go on."""

    seq_id: str
    choice: int
    code: str  # a label of core/errors.py
    message: str


class Gauges(msgspec.Struct, frozen=True):
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    running: int = 0
    waiting: int = 0
    queued_prefill_tokens: int = 0  # these as in WorkerReport
    queued_prefill_context: int = 0
    running_context: int = 0
    model: StepModel | None = None
    newest: list[int] = []
    prompt_tokens: int = 0  # totals since start
    prefix_hit_tokens: int = 0
    preemptions: int = 0


class Step(msgspec.Struct, frozen=True):
    """One run of the model."""

    seconds: float
    prefill_tokens: int
    decode_tokens: int


class Report(msgspec.Struct, frozen=True):
    """All that one turn of the engine brought."""

    admitted: list[Admitted] = []
    refused: list[Refused] = []
    advanced: list[Advanced] = []
    scored: list[Scored] = []
    tokens: list[Token] = []
    revoked: list[Revoked] = []
    failed: list[Failed] = []
    dropped: list[str] = []
    stored: list[ChainLink] = []  # blocks that became reusable
    evicted: list[bytes] = []  # hashes of those that no longer are
    gauges: Gauges = Gauges()
    step: Step | None = None
    silence_s: float = 0.0  # the engine will say nothing for about so long: a long step follows
