"""One sequence on a worker: its tokens, how far they are computed, and the blocks that hold their KV.

    known      prompt + answer so far; the last token of a running answer is known but not computed
    computed   leading tokens whose KV is in the blocks
    sealed     leading blocks that have their hash

                 sealed blocks        computed        known
    tokens   |───────────────────|───────────────|──────|
    blocks   |███████████████████|███████████░░░░|          ░ allocated, no token yet

Each step moves `computed` towards the number of known tokens; there is no other notion of phase.

A sequence with several choices holds what they share: the prompt. When its KV is there it forks, and
each choice is a sequence of its own, with the prompt's full blocks in common.
"""

from collections.abc import Sequence as Ids
from copy import copy
from enum import Enum, auto

from services.core.block_hash import block_hash
from services.core.sampling import SamplingParams
from services.engine.block_pool import BlockPool
from services.engine.messages import Kind, Submit
from services.engine.runner import Sample, Targets


class State(Enum):
    """local:    WAITING (-> FETCHING) -> RUNNING (-> WAITING when preempted)
    prefill:  WAITING (-> FETCHING) -> RUNNING -> HELD
    receive:  WAITING -> RECEIVING (-> REVOKED) -> RUNNING, then as local"""

    WAITING = auto()  # owns no block
    FETCHING = auto()  # KV of its prefix is on its way into its blocks
    RECEIVING = auto()  # its blocks are reserved, KV is on its way
    REVOKED = auto()  # its reservation was asked back; the blocks stay until it is dropped
    RUNNING = auto()
    HELD = auto()  # computed; the blocks stay for a reader until dropped


class Sequence:
    def __init__(self, submit: Submit, root: bytes, arrived_s: float) -> None:
        self.seq_id = submit.seq_id
        self.kind: Kind = submit.kind
        self.params: SamplingParams = submit.sampling
        self.prompt_ids = submit.prompt_ids
        self.output_ids = list(submit.output_ids)
        self.tokens = [*submit.prompt_ids, *submit.output_ids]
        self.serve(submit.choices)
        self.arrived_s = arrived_s
        self.state = State.WAITING
        self.computed = 0
        # The logprobs of the prompt's tokens after so many are still to be reported: their KV is computed
        # here, whoever has it.
        self.unscored_from: int | None = None
        if submit.sampling.prompt_logprobs is not None and submit.kind != "receive":
            self.scored(0)
        # What another worker has, until that is fetched or cached.
        self.fetch_tokens = 0 if self.unscored_from is not None else submit.fetch_tokens
        self.cached_tokens = 0  # while it waits: what the cache had of it when it began to
        self.blocks: list[int] = []
        self.reported = False  # its admission was reported
        self._root = root
        self._hashes: list[bytes] = []
        self._sealed = 0

    @property
    def known(self) -> int:
        return len(self.tokens)

    @property
    def remaining(self) -> int:
        """Known tokens that still have to be computed."""
        return len(self.tokens) - self.computed

    @property
    def to_compute(self) -> int:
        """Of the remaining tokens those that are expected neither from the cache nor from another worker."""
        return len(self.tokens) - max(self.computed, self.fetch_tokens, self.cached_tokens)

    @property
    def computes_prompt(self) -> bool:
        """Tokens of its prompt are computed here, now or later."""
        return self.state in (State.WAITING, State.FETCHING, State.RUNNING) and not self.decoding

    @property
    def decoding(self) -> bool:
        """Only its newest token is left to compute: it yields one token a step."""
        return self.remaining == 1 and bool(self.output_ids)

    @property
    def preemptible(self) -> bool:
        """Nobody outside the engine reads or writes its blocks."""
        return self.state is State.RUNNING and self.kind != "prefill"

    @property
    def reusable_tokens(self) -> int:
        """Leading tokens that need not be computed if their KV is there. At least the last one must be,
        to get logits."""
        most = len(self.tokens) - 1
        return most if self.unscored_from is None else min(self.unscored_from, most)

    def targets(self, end: int) -> Targets | None:
        """The prompt's tokens whose logprobs come of computing up to `end` and are still to be reported."""
        if self.unscored_from is None or self.params.prompt_logprobs is None:
            return None
        first = max(self.computed, self.unscored_from) + 1
        ids = self.prompt_ids[first : end + 1]
        return Targets(first, ids, self.params.prompt_logprobs) if ids else None

    def scored(self, computed: int) -> None:
        """The logprobs of the prompt's tokens that follow the first `computed` ones are reported."""
        self.unscored_from = computed if computed + 1 < len(self.prompt_ids) else None

    def hashes(self, block_size: int) -> list[bytes]:
        """The chain over all full blocks of the known tokens."""
        for index in range(len(self._hashes), len(self.tokens) // block_size):
            parent = self._hashes[-1] if self._hashes else self._root
            self._hashes.append(
                block_hash(parent, self.tokens[index * block_size : (index + 1) * block_size])
            )
        return self._hashes

    def serve(self, choices: Ids[int]) -> None:
        """Answer for these choices from now on: one, after the fork."""
        self.choices = choices
        # They see output_ids grow: they are made once, not for every step.
        self.samples = [Sample(self.params, self.prompt_ids, self.output_ids, choice) for choice in choices]

    def append(self, token: int) -> None:
        """Add a sampled token."""
        self.tokens.append(token)
        self.output_ids.append(token)

    def fork(self, choice: int) -> "Sequence":
        """Another answer to the same tokens: a waiting sequence without blocks, for `choice` alone."""
        fork = copy(self)
        fork.kind = "local"
        fork.state = State.WAITING
        fork.output_ids, fork.tokens = list(self.output_ids), list(self.tokens)
        fork.serve([choice])
        fork.blocks, fork.computed, fork._sealed = [], 0, 0
        fork.cached_tokens = self.computed  # in its parent's blocks, should it have to wait
        fork._hashes = list(self._hashes)
        return fork

    def seal(self, pool: BlockPool, proven: int) -> None:
        """Give every block that is full of the leading `proven` tokens its hash."""
        full = proven // pool.block_size
        if full > self._sealed:
            hashes = self.hashes(pool.block_size)
            for index in range(self._sealed, full):
                pool.seal(self.blocks[index], hashes[index], hashes[index - 1] if index else b"")
            self._sealed = full

    def adopt(self, matched: Ids[int], block_size: int) -> None:
        """Begin the block table with `matched` blocks, which are computed already."""
        self.blocks = list(matched)
        self.computed = len(matched) * block_size
        self.cached_tokens = 0
        self._sealed = len(matched)

    def share(self, parent: "Sequence", pool: BlockPool) -> tuple[int, int] | None:
        """Begin with the computed tokens of `parent`: its full blocks, referenced once more, and a copy of
        the partial one, which is (from, to), if there is one."""
        shared = parent.computed // pool.block_size
        pool.acquire(parent.blocks[:shared])
        self.blocks = parent.blocks[:shared]
        self.computed, self._sealed = parent.computed, parent._sealed
        if shared == pool.blocks_for(parent.computed):
            return None
        self.blocks += pool.allocate(1)
        return parent.blocks[shared], self.blocks[shared]

    def surrender(self, pool: BlockPool) -> None:
        """Give all blocks back; what was sealed stays in the cache."""
        self.cached_tokens = self._sealed * pool.block_size
        pool.release(self.blocks)
        self.blocks = []
        self.computed = 0
        self._sealed = 0
