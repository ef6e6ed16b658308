"""Which sequences run in the next step, and with how many tokens.

One budget, no phases. Decoding sequences come first, one token each. What is left of the step goes
to sequences with uncomputed tokens, oldest first, at least one block each step if any waits; waiting
sequences are admitted when the older ones leave some of it. A sequence that computes here gets its
blocks chunk by chunk, a reservation all at once; one that first fetches a prefix from another worker
gets the prefix's blocks, and lets those behind it pass until the KV is there, unless they have use for
that prefix too: then they wait for it. So does one whose prefix this very step computes, if that saves
more than a step costs. When a
decoding sequence needs a block and none is available, room is made in this order: cached blocks
(the pool evicts them by itself), the newest reservation (asked back: its blocks come with a later
command, since KV may still be landing in them), the newest preemptible sequence.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from router.step_model import StepModel, context_of
from services.core.block_hash import shared_blocks
from services.engine.block_pool import BlockPool
from services.engine.messages import Limits
from services.engine.sequence import Sequence, State
from services.engine.step_times import StepTimes

# How many waiting sequences others may pass, so that each step looks at a bounded part of the queue.
_PASSED_MAX = 31


@dataclass(frozen=True, slots=True)
class Chunk:
    """`tokens` tokens of a sequence to compute next."""

    sequence: Sequence
    tokens: int


class Scheduler:
    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self._pool = pool
        self._limits = limits
        self.waiting: deque[Sequence] = deque()
        self.admitted: list[Sequence] = []  # hold blocks; oldest first
        self.newly_running: list[Sequence] = []  # admitted since the engine last looked
        self.revoked: list[Sequence] = []  # reservations asked back since the engine last looked
        self.preemptions = 0

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self._limits.waiting_max

    def sequences(self) -> list[Sequence]:
        return [*self.admitted, *self.waiting]

    def wait(self, sequence: Sequence) -> None:
        """Let a new sequence wait its turn."""
        size = self._pool.block_size
        reusable = sequence.hashes(size)[: sequence.reusable_tokens // size]
        sequence.cached_tokens = len(self._pool.match(reusable)) * size
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks."""
        owner = self.waiting if sequence.state is State.WAITING else self.admitted
        owner.remove(sequence)
        sequence.surrender(self._pool)

    def reserve(self, sequence: Sequence) -> bool:
        """Take all blocks of a `receive` sequence at once. False: no room beside those who are here."""
        queued = sum(self._pool.blocks_for(one.known) + self._blocks_to_fork(one) for one in self.waiting)
        if not self._admit(sequence, sequence.known, keep_free=queued):
            return False
        missing = self._pool.blocks_for(sequence.known) - len(sequence.blocks)
        sequence.blocks.extend(self._pool.allocate(missing))
        sequence.state = State.RECEIVING
        return True

    def fork(self, parent: Sequence, forks: list[Sequence]) -> list[tuple[int, int]]:
        """Let choices of `parent`, whose tokens are all computed, go on beside it; the blocks to copy.

        One that finds no room waits at the head of the queue, like a preempted sequence.
        """
        copies: list[tuple[int, int]] = []
        place = self.admitted.index(parent)  # as old as the parent
        partial = int(parent.computed % self._pool.block_size > 0)
        for fork in forks:
            if len(self.admitted) >= self._limits.sequences_max or not self._pool.can_allocate(partial):
                break
            if copied := fork.share(parent, self._pool):
                copies.append(copied)
            fork.state = State.RUNNING
            place += 1
            self.admitted.insert(place, fork)
        self.waiting.extendleft(fork for fork in reversed(forks) if fork.state is State.WAITING)
        return copies

    def schedule(self, times: StepTimes) -> list[Chunk]:
        """The next step's work. Blocks for all of it are allocated when this returns."""
        model = times.model
        decoding = [Chunk(sequence, 1) for sequence in self._grown_decoding()]
        budget = self._mixed_budget(decoding, model) if decoding else self._limits.chunk_tokens_max
        chunks = decoding + self._prefill_chunks(self._whole_blocks(budget), len(decoding), model)
        if not chunks:
            self._break_circle()
        return chunks

    def _prefill_chunks(self, budget: int, spare: int, model: StepModel | None) -> list[Chunk]:
        """Chunks of together at most `budget` tokens, leaving `spare` blocks for growth."""
        chunks: list[Chunk] = []
        for sequence in self._computing(model):
            tokens = self._extend(sequence, min(sequence.remaining, budget), spare)
            if tokens:
                chunks.append(Chunk(sequence, tokens))
                budget -= tokens
            if budget <= 0 or sequence.remaining > tokens:
                break  # those behind wait for this one, so that at most one prompt is half computed
        return chunks

    def _computing(self, model: StepModel | None) -> Iterator[Sequence]:
        """Sequences with uncomputed tokens, oldest first, then waiting ones, admitted when asked for."""
        yield from [s for s in self.admitted if s.state is State.RUNNING and not s.decoding]
        while (sequence := self._next_waiting(model)) and self._admit(sequence, sequence.reusable_tokens):
            self.waiting.remove(sequence)
            self.newly_running.append(sequence)
            if self._begins_fetch(sequence):
                continue  # those behind it need not wait
            sequence.state = State.RUNNING
            yield sequence

    def _next_waiting(self, model: StepModel | None) -> Sequence | None:
        """The oldest that does not wait for KV which another sequence is fetching or computing."""
        if not self.waiting:
            return None  # most steps
        coming = [s for s in self.admitted if s.state in (State.FETCHING, State.RUNNING) and not s.decoding]
        passing = islice(self.waiting, _PASSED_MAX + 1)
        return next((s for s in passing if not self._waits_for_prefix(s, coming, model)), None)

    def _waits_for_prefix(self, sequence: Sequence, coming: list[Sequence], model: StepModel | None) -> bool:
        """Whether blocks that `sequence` lacks are on their way, and worth the wait.

        A fetch ends within the time that computing would take: waiting for it costs little and saves
        fetching or computing the same. What older sequences have left to compute is all in this step,
        or nobody would ask for one that waits: the next step finds it, and is one more.
        """
        if not coming:
            return False
        size = self._pool.block_size
        chain = sequence.hashes(size)[: sequence.reusable_tokens // size]
        lacking = len(self._pool.match(chain))
        for other in coming:
            fetched = other.state is State.FETCHING
            there = other.hashes(size)[: (other.fetch_tokens if fetched else other.known) // size]
            blocks = shared_blocks(chain, there) - lacking
            if blocks > 0 and (fetched or _saves_a_step(model, blocks * size, lacking * size)):
                return True
        return False

    def _begins_fetch(self, sequence: Sequence) -> bool:
        """Give a sequence that was just admitted the blocks for the KV that others have of it, if any."""
        size = self._pool.block_size
        sequence.fetch_tokens = min(sequence.fetch_tokens, sequence.known - 1) // size * size
        if sequence.fetch_tokens <= sequence.computed:
            sequence.fetch_tokens = 0
            return False
        sequence.state = State.FETCHING
        missing = sequence.fetch_tokens // size - len(sequence.blocks)
        sequence.blocks.extend(self._pool.allocate(missing))
        return True

    def _admit(self, sequence: Sequence, reusable_tokens: int, keep_free: int = 0) -> bool:
        """Let a sequence in with its cached prefix, if all its known tokens would find room now."""
        if len(self.admitted) >= self._limits.sequences_max:
            return False
        size = self._pool.block_size
        matched = self._pool.match(sequence.hashes(size)[: reusable_tokens // size])
        needed = self._pool.blocks_for(sequence.known) - len(matched)
        # Choices that could never be here all at once run one after another.
        forks = min(self._blocks_to_fork(sequence), max(self._pool.blocks - len(matched) - needed, 0))
        wanted = needed + forks + self._expected_growth() + keep_free
        if not self._pool.can_allocate(wanted, keep=matched):
            return False
        self._pool.acquire(matched)
        sequence.adopt(matched, size)
        self.admitted.append(sequence)
        return True

    def _blocks_to_fork(self, sequence: Sequence) -> int:
        """Blocks that a sequence's further choices will want, once their prompt is here."""
        if sequence.kind == "prefill":
            return 0
        return min(len(sequence.choices), self._limits.sequences_max) - 1

    def _extend(self, sequence: Sequence, tokens: int, spare: int) -> int:
        """Allocate blocks for up to `tokens` more tokens; how many have room."""
        size = self._pool.block_size
        free = max(self._pool.available - spare, 0)
        tokens = min(tokens, (len(sequence.blocks) + free) * size - sequence.computed)
        missing = self._pool.blocks_for(sequence.computed + tokens) - len(sequence.blocks)
        sequence.blocks.extend(self._pool.allocate(max(missing, 0)))
        return tokens

    def _mixed_budget(self, decoding: list[Chunk], model: StepModel | None) -> int:
        """Prompt tokens that keep a step with decoding sequences near its target length."""
        most = self._limits.chunk_tokens_max
        if model is None or not model.knows_prefill:
            return most
        decode_ms = model.decode_ms(len(decoding), sum(chunk.sequence.known for chunk in decoding))
        start = next((s.computed for s in self.sequences() if s.computes_prompt), 0)
        return min(model.tokens_within(self._limits.step_ms_target - decode_ms, start), most)

    def _whole_blocks(self, tokens: int) -> int:
        size = self._pool.block_size
        return max(tokens // size, 1) * size

    def _break_circle(self) -> None:
        """Two workers that both prefill and decode may reserve for each other's prompts and so leave no
        room to compute them. Whoever has only reservations and a prompt waiting behind them gives one
        back; it is routed again after a random pause, so not both do so for ever."""
        only_reservations = all(s.state in (State.RECEIVING, State.REVOKED) for s in self.admitted)
        if self.admitted and only_reservations and any(s.kind == "prefill" for s in self.waiting):
            self._revoke_newest()

    def _expected_growth(self) -> int:
        """Blocks that sequences already here will want: for the rest of their known tokens, and one more
        for each choice."""
        pool = self._pool
        return sum(
            pool.blocks_for(s.known) - len(s.blocks) + self._blocks_to_fork(s) + (s.kind != "prefill")
            for s in self.admitted
            if s.state is not State.HELD
        )

    def _grown_decoding(self) -> list[Sequence]:
        """Decoding sequences that have a slot for their next token, after making room."""
        decoding = [s for s in self.admitted if s.state is State.RUNNING and s.decoding]
        grown = [sequence for sequence in decoding if self._grow(sequence)]
        return [sequence for sequence in grown if sequence.state is State.RUNNING]  # not preempted later

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure of a slot for the newest token. False: not in this step."""
        if sequence.state is not State.RUNNING:
            return False  # preempted for an older sequence just now
        if sequence.known <= len(sequence.blocks) * self._pool.block_size:
            return True
        while not self._pool.can_allocate(1):
            if self._revoke_newest():
                return False  # its blocks come back with the Drop that answers the revocation
            victim = self._newest_preemptible()
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks.extend(self._pool.allocate(1))
        return True

    def _revoke_newest(self) -> bool:
        """Ask a reservation back, unless one is on its way back already. False: there is none."""
        if any(sequence.state is State.REVOKED for sequence in self.admitted):
            return True
        for sequence in reversed(self.admitted):
            if sequence.state is State.RECEIVING:
                sequence.state = State.REVOKED
                self.revoked.append(sequence)
                return True
        return False

    def _newest_preemptible(self) -> Sequence:
        """There is one: the decoding sequence that asks is itself preemptible."""
        return next(sequence for sequence in reversed(self.admitted) if sequence.preemptible)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue. Its sealed blocks stay cached; only what is evicted
        meanwhile is computed again."""
        self.admitted.remove(sequence)
        sequence.surrender(self._pool)
        sequence.state = State.WAITING
        sequence.kind = "local"
        self.waiting.appendleft(sequence)
        self.preemptions += 1


def _saves_a_step(model: StepModel | None, tokens: int, start: int) -> bool:
    """Whether computing so many tokens takes longer than one more step; taken to be so until measured."""
    if model is None or not model.knows_prefill:
        return True
    return model.tokens_ms(tokens, context_of(tokens, start)) > model.step
