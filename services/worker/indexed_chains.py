"""Which of a worker's cached blocks the cluster's index shows: at most `limit`, the newest chains first.

What is shown is closed under prefixes, which look-ups rely on: a block is shown only together with all
blocks before it. So room is made at the tail of the chain that was extended the longest ago, and goes on
towards its head, up to where another chain branches off:

    a0 ─ a1 ─ a2 ─ a3            leaves, oldest first: a3, b3      over the limit: a3 goes, a2 is a leaf
          └── b2 ─ b3                                              and the oldest; then a2, then b3 ...

A block left out for want of room comes back when its chain is extended. One whose parent is not cached (two
sequences computed the same prompt, and the first copy was evicted before the descendants of the second)
could not be found anyway, and waits until its parent is cached again.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable

from services.core.block_hash import ChainLink


class IndexedChains:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parent: dict[bytes, bytes] = {}  # of every cached block
        self._children: defaultdict[bytes, dict[bytes, None]] = defaultdict(dict)  # cached ones, in order
        self._shown: dict[bytes, int] = {}  # with the number of their shown children; parents come first
        self._leaves: OrderedDict[bytes, None] = OrderedDict()  # shown blocks without shown children
        # What the index has not been told yet. Both keep an order in which each step leaves it closed.
        self._added: OrderedDict[bytes, None] = OrderedDict()
        self._removed: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._shown)

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, blocks: int) -> None:
        self._limit = blocks
        self._make_room()

    def record(self, stored: Iterable[ChainLink], evicted: Iterable[bytes]) -> None:
        """Note what the worker's cache has gained, then what it has lost."""
        for link in stored:
            self._store(link)
        for block in evicted:
            self._evict(block)
        self._make_room()

    @property
    def changed(self) -> bool:
        return bool(self._added or self._removed)

    def take_changes(self, at_most: int) -> tuple[list[bytes], list[bytes]]:
        """The oldest changes since they were taken before: blocks to add to the index and to remove. After
        each batch what the index shows is closed."""
        removed = _take(self._removed, at_most)
        return _take(self._added, at_most - len(removed)), removed

    def forget_changes(self) -> None:
        """The index is empty: all that is shown has to be added to it."""
        self._added, self._removed = OrderedDict.fromkeys(self._shown), OrderedDict()

    def _store(self, link: ChainLink) -> None:
        if link.hash in self._parent:
            return
        self._parent[link.hash] = link.parent
        if link.parent:
            self._children[link.parent][link.hash] = None
        if self._show_with_ancestors(link.hash):
            self._show_descendants(link.hash)

    def _evict(self, block: bytes) -> None:
        if block not in self._parent:
            return
        if block in self._shown:
            self._hide_with_descendants(block)
        parent = self._parent.pop(block)
        if parent:
            del self._children[parent][block]
            if not self._children[parent]:
                del self._children[parent]

    def _show_with_ancestors(self, block: bytes) -> bool:
        """False: one of them is not cached."""
        chain = []
        while block and block not in self._shown:
            if block not in self._parent:
                return False
            chain.append(block)
            block = self._parent[block]
        for hidden in reversed(chain):
            self._show(hidden)
        return True

    def _show_descendants(self, block: bytes) -> None:
        """Those that have waited for it."""
        waiting = list(self._children.get(block, ()))
        for child in waiting:  # grows meanwhile
            self._show(child)
            waiting.extend(self._children.get(child, ()))

    def _hide_with_descendants(self, block: bytes) -> None:
        chain = [block]
        for ancestor in chain:  # grows meanwhile
            chain.extend(child for child in self._children.get(ancestor, ()) if child in self._shown)
        for shown in reversed(chain):
            self._hide(shown)

    def _make_room(self) -> None:
        while len(self._shown) > self._limit:
            self._hide(next(iter(self._leaves)))

    def _show(self, block: bytes) -> None:
        self._shown[block] = 0
        self._leaves[block] = None
        parent = self._parent[block]
        if parent:
            self._shown[parent] += 1
            self._leaves.pop(parent, None)
        if block in self._removed:
            del self._removed[block]
        else:
            self._added[block] = None

    def _hide(self, block: bytes) -> None:
        """The block is a leaf."""
        del self._shown[block], self._leaves[block]
        parent = self._parent[block]
        if parent:
            self._shown[parent] -= 1
            if self._shown[parent] == 0:
                self._leaves[parent] = None
                self._leaves.move_to_end(parent, last=False)  # as old as its last child
        if block in self._added:
            del self._added[block]
        else:
            self._removed[block] = None


def _take(blocks: OrderedDict[bytes, None], at_most: int) -> list[bytes]:
    """The first of them, away."""
    return [blocks.popitem(last=False)[0] for _ in range(min(at_most, len(blocks)))]
