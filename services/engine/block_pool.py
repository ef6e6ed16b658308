"""Who owns which KV block. The pool knows block ids and hashes, never the bytes.

Every block is in exactly one place:

    free     holds nothing                                   _free
    used     referenced by one or more sequences             _references > 0
    cached   referenced by nobody, sealed: kept for reuse    _cached, oldest first

    allocate: free (or cached, evicting the oldest) -> used      release: used -> cached if sealed, else free
    acquire:  used or cached -> used (one more reference)        seal:    gives a full, proven block its hash

A sequence releases its blocks tail first, so that a chain is evicted from its end and what remains is
a usable prefix. If two blocks get the same hash (two sequences computed the same prompt at once), the
first keeps it and the second stays private to its sequence; should the first be evicted earlier than
the second's descendants, those cannot be matched until they are evicted too: wasted, not wrong.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, MutableSequence, Sequence
from typing import TypeAlias

from services.core.block_hash import ChainLink

Generations: TypeAlias = MutableSequence[int] | memoryview


class BlockPool:
    def __init__(self, blocks: int, block_size: int, generations: Generations | None = None) -> None:
        """`generations[block]` is raised whenever a block is handed out for new content, so that a
        reader in another process sees that what it reads is no longer what it was."""
        self.blocks = blocks
        self._generations = [0] * blocks if generations is None else generations
        self.block_size = block_size
        self._free: deque[int] = deque(range(blocks))
        self._references = [0] * blocks
        self._hash_of: list[bytes | None] = [None] * blocks
        self._by_hash: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._stored: dict[bytes, ChainLink] = {}
        self._evicted: list[bytes] = []

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest resident prefix of a chain. Changes nothing."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def can_allocate(self, count: int, keep: Sequence[int] = ()) -> bool:
        """Whether `count` blocks can be had while the matched blocks `keep` are acquired as well."""
        return count + sum(self._references[block] == 0 for block in keep) <= self.available

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller asked `can_allocate` before."""
        assert count <= self.available, "allocate without can_allocate"
        taken = [self._free.popleft() if self._free else self._evict_oldest() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
            self._generations[block] += 1
        return taken

    def acquire(self, blocks: Sequence[int]) -> None:
        """One more reference on each of the matched `blocks`."""
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less on each of a sequence's `blocks`, which come in chain order."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._park(block)

    def seal(self, block: int, block_hash: bytes, parent: bytes = b"") -> None:
        """Give a full block, whose KV is proven, its identity: from now on it can be matched. `parent` is
        the hash of the block before it, if there is one."""
        assert self._references[block] > 0, f"block {block} sealed without an owner"
        if block_hash in self._by_hash or self._hash_of[block] is not None:
            return
        self._by_hash[block_hash] = block
        self._hash_of[block] = block_hash
        self._stored[block_hash] = ChainLink(block_hash, parent)

    def take_changes(self) -> tuple[list[ChainLink], list[bytes]]:
        """What was stored and evicted since the last call; what was both, in its last state."""
        gone = [value for value in dict.fromkeys(self._evicted) if value not in self._by_hash]
        new = [link for link in self._stored.values() if link.hash in self._by_hash]
        self._stored, self._evicted = {}, []
        return new, gone

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Prove that free, used and cached blocks add up, given every sequence's block table."""
        expected = Counter(block for table in owners for block in table)
        for block, references in enumerate(self._references):
            assert references == expected[block], (
                f"block {block}: {references} references, {expected[block]} owners"
            )
        used = {block for block, references in enumerate(self._references) if references}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.blocks, "a block is lost or owned twice"
        assert free | cached | used == set(range(self.blocks)), "a block is in two places"
        assert all(self._hash_of[block] is not None for block in cached), "a cached block has no hash"
        assert all(self._hash_of[block] is None for block in free), "a free block has a hash"
        assert all(self._hash_of[block] == value for value, block in self._by_hash.items()), (
            "a hash is astray"
        )

    def _park(self, block: int) -> None:
        if self._hash_of[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def _evict_oldest(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hash_of[block]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hash_of[block] = None
        self._evicted.append(block_hash)
        return block
