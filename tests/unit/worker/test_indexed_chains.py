"""What the index shows of a cache: closed under prefixes, bounded, the newest first."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from services.core.block_hash import ChainLink
from services.worker.indexed_chains import IndexedChains


def chain(name: str, length: int = 4, after: bytes = b"") -> list[ChainLink]:
    """Blocks name0, name1, ... that follow the block `after`."""
    links: list[ChainLink] = []
    for number in range(length):
        parent = links[-1].hash if links else after
        links.append(ChainLink(f"{name}{number}".encode(), parent))
    return links


def hashes(links: list[ChainLink]) -> set[bytes]:
    return {link.hash for link in links}


class Shown:
    """An index that follows the changes, in batches."""

    def __init__(self, limit: int) -> None:
        self.chains = IndexedChains(limit)
        self.blocks: set[bytes] = set()

    def after(self, stored: list[ChainLink] = [], evicted: list[bytes] = []) -> set[bytes]:  # noqa: B006
        self.chains.record(stored, evicted)
        while self.chains.changed:
            added, removed = self.chains.take_changes(3)
            assert not self.blocks & set(added)
            assert set(removed) <= self.blocks
            self.blocks = self.blocks - set(removed) | set(added)
        return self.blocks


def test_all_is_shown_while_there_is_room() -> None:
    assert Shown(8).after([*chain("a"), *chain("b")]) == hashes([*chain("a"), *chain("b")])


def test_what_leaves_the_cache_is_not_shown() -> None:
    shown = Shown(8)
    shown.after(chain("a"))
    assert shown.after(evicted=[b"a3", b"a2"]) == {b"a0", b"a1"}


def test_room_is_made_at_the_tail_of_the_chain_extended_the_longest_ago() -> None:
    shown = Shown(8)
    shown.after(chain("a"))
    shown.after(chain("b"))
    assert shown.after(chain("c", 1)) == hashes([*chain("a", 3), *chain("b"), *chain("c", 1)])
    shown.after([ChainLink(b"a3", b"a2"), ChainLink(b"a4", b"a3")])
    assert shown.blocks == hashes([*chain("a", 5), *chain("b", 2), *chain("c", 1)])


def test_a_beginning_that_chains_share_outlives_the_older_of_them() -> None:
    shown = Shown(5)
    shown.after(chain("a"))
    shown.after(chain("b", 3, after=b"a1"))
    assert shown.blocks == {b"a0", b"a1", b"b0", b"b1", b"b2"}
    assert shown.after(chain("c", 1)) == {b"a0", b"a1", b"b0", b"b1", b"c0"}


def test_of_a_chain_longer_than_the_limit_the_beginning_is_shown() -> None:
    assert Shown(3).after(chain("a", 9)) == hashes(chain("a", 3))


def test_a_chain_that_was_left_out_comes_back_when_it_is_extended() -> None:
    shown = Shown(4)
    shown.after(chain("a", 3))
    shown.after(chain("b", 4))
    assert shown.blocks == hashes(chain("b"))
    assert shown.after([ChainLink(b"a3", b"a2")]) == hashes(chain("a"))


def test_a_block_whose_parent_is_not_cached_waits_for_it() -> None:
    shown = Shown(8)
    shown.after(chain("a"))
    assert shown.after(evicted=[b"a1"]) == {b"a0"}
    assert shown.after([ChainLink(b"a4", b"a3")]) == {b"a0"}
    assert shown.after([ChainLink(b"a1", b"a0")]) == hashes(chain("a", 5))


def test_a_lower_limit_counts_at_once_and_a_higher_one_from_the_next_block_on() -> None:
    shown = Shown(8)
    shown.after(chain("a"))
    shown.chains.limit = 2
    assert shown.after() == {b"a0", b"a1"}
    shown.chains.limit = 8
    assert shown.after() == {b"a0", b"a1"}
    assert shown.after([ChainLink(b"a4", b"a3")]) == hashes(chain("a", 5))


def test_changes_that_undo_each_other_are_not_told() -> None:
    chains = IndexedChains(8)
    chains.record(chain("a"), [])
    chains.record([], [b"a3"])
    assert chains.take_changes(9) == ([b"a0", b"a1", b"a2"], [])
    chains.record([], [b"a2"])
    chains.record([ChainLink(b"a2", b"a1")], [])
    assert not chains.changed


def test_an_index_that_lost_all_is_told_all_parents_first() -> None:
    chains = IndexedChains(8)
    chains.record([*chain("a"), *chain("b")], [])
    chains.take_changes(9)
    chains.record([], [b"a3"])
    chains.forget_changes()
    added, removed = chains.take_changes(9)
    assert removed == []
    assert added == [link.hash for link in [*chain("a", 3), *chain("b")]]


@dataclass
class Model:
    """The same rules, written for clarity: every step looks at everything."""

    limit: int
    parent: dict[bytes, bytes] = field(default_factory=dict)
    shown: list[bytes] = field(default_factory=list)  # the first leaf in it is the next to go

    def store(self, block: bytes, parent: bytes) -> None:
        if block in self.parent:
            return
        self.parent[block] = parent
        if self.is_whole(block):
            for needed in self.ancestors(block):
                self.show(needed)
            waiting = [block]
            for needed in waiting:
                self.show(needed)
                waiting += [other for other in self.parent if self.parent[other] == needed]

    def evict(self, block: bytes) -> None:
        for other in [b for b in self.parent if block in self.ancestors(b)][::-1]:
            self.hide(other)
        self.parent.pop(block, None)

    def ancestors(self, block: bytes) -> list[bytes]:
        """The chain to `block`, as far as it is cached."""
        found: list[bytes] = []
        while block in self.parent:
            found.insert(0, block)
            block = self.parent[block]
        return found

    def is_whole(self, block: bytes) -> bool:
        return self.parent[self.ancestors(block)[0]] == b""

    def show(self, block: bytes) -> None:
        if block not in self.shown:
            self.shown.append(block)

    def leaves(self) -> list[bytes]:
        return [b for b in self.shown if not any(self.parent[other] == b for other in self.shown)]

    def hide(self, block: bytes) -> None:
        if block in self.shown:
            for child in [other for other in self.shown if self.parent[other] == block]:
                self.hide(child)
            self.shown.remove(block)
            parent = self.parent[block]
            if parent in self.leaves():
                self.shown.remove(parent)
                self.shown.insert(0, parent)

    def make_room(self) -> None:
        while len(self.shown) > self.limit:
            self.hide(self.leaves()[0])


# Blocks are paths in a tree: b"012" follows b"01" follows b"0".
paths = st.text("012", min_size=1, max_size=5).map(str.encode)
steps = st.one_of(
    st.tuples(st.just("store chain"), paths),
    st.tuples(st.just("store block"), paths),
    st.tuples(st.just("evict"), paths),
    st.tuples(st.just("limit"), st.integers(0, 12)),
    st.tuples(st.just("restart"), st.none()),
)


def links_to(path: bytes) -> list[ChainLink]:
    return [ChainLink(path[:end], path[: end - 1]) for end in range(1, len(path) + 1)]


@given(st.lists(steps, max_size=40), st.integers(0, 12))
def test_after_any_history_the_index_shows_what_the_rules_say_and_is_closed_at_every_moment(
    history: list[tuple[str, object]], limit: int
) -> None:
    chains, model, shown = IndexedChains(limit), Model(limit), set[bytes]()
    for kind, operand in history:
        stored: list[ChainLink] = []
        evicted: list[bytes] = []
        if isinstance(operand, bytes):
            stored = {"store chain": links_to(operand), "store block": links_to(operand)[-1:]}.get(kind, [])
            evicted = [operand] if kind == "evict" else []
        if isinstance(operand, int):
            chains.limit = model.limit = operand
        if kind == "restart":
            shown = set()
            chains.forget_changes()
        chains.record(stored, evicted)
        for link in stored:
            model.store(*link)
        for block in evicted:
            model.evict(block)
        model.make_room()
        if kind != "limit":  # leave some changes untold for a while
            added, removed = chains.take_changes(2)
            shown = shown - set(removed) | set(added)
            assert all(len(block) == 1 or block[:-1] in shown for block in shown)
        assert len(chains) == len(model.shown) <= model.limit
    while chains.changed:
        added, removed = chains.take_changes(1)
        shown = shown - set(removed) | set(added)
        assert all(len(block) == 1 or block[:-1] in shown for block in shown)
    assert shown == set(model.shown)
