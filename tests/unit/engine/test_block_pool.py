"""The pool's books: every block in one place, prefixes reusable, the oldest evicted first."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.core.block_hash import Compatibility, chain_hashes, chain_root
from services.engine.block_pool import BlockPool

ROOT = chain_root(Compatibility(model="m", revision="r", layout="l"))


def hashes(count: int, first: int = 0) -> list[bytes]:
    return chain_hashes([first + token for token in range(count)], 1, ROOT)


def sealed(pool: BlockPool, chain: list[bytes]) -> list[int]:
    blocks = pool.allocate(len(chain))
    for block, block_hash in zip(blocks, chain, strict=True):
        pool.seal(block, block_hash)
    return blocks


def test_a_block_gets_a_new_generation_when_it_is_handed_out_and_only_then() -> None:
    generations = [0, 0]
    pool, chain = BlockPool(2, 16, generations), hashes(1)
    (block,) = pool.allocate(1)
    pool.seal(block, chain[0])
    pool.release([block])
    pool.acquire(pool.match(chain))
    assert generations[block] == 1, "the same content, taken from the cache"
    pool.release([block])
    pool.allocate(2)
    assert (generations[block], generations[1 - block]) == (2, 1)


def test_a_released_chain_can_be_matched_and_acquired_again() -> None:
    pool, chain = BlockPool(8, 16), hashes(3)
    blocks = sealed(pool, chain)
    pool.release(blocks)
    assert pool.match(chain) == blocks
    pool.acquire(blocks)
    pool.check_integrity([blocks])
    assert pool.cached == 0


def test_a_match_stops_at_the_first_missing_block() -> None:
    pool, chain = BlockPool(8, 16), hashes(4)
    blocks = sealed(pool, [chain[0], chain[1], chain[3]])
    assert pool.match(chain) == blocks[:2]


def test_eviction_takes_the_tail_of_the_oldest_chain_first() -> None:
    pool, old, new = BlockPool(4, 16), hashes(2), hashes(2, first=100)
    for chain in (old, new):
        pool.release(sealed(pool, chain))
    pool.allocate(1)
    assert len(pool.match(old)) == 1
    assert len(pool.match(new)) == 2
    assert pool.take_changes()[1] == [old[1]]


def test_unsealed_blocks_become_free_not_cached() -> None:
    pool = BlockPool(4, 16)
    pool.release(pool.allocate(3))
    assert (pool.free, pool.cached) == (4, 0)


def test_a_shared_block_stays_used_until_its_last_reference_goes() -> None:
    pool, chain = BlockPool(4, 16), hashes(1)
    blocks = sealed(pool, chain)
    pool.acquire(blocks)
    pool.release(blocks)
    assert pool.cached == 0
    pool.release(blocks)
    assert pool.cached == 1


def test_matched_blocks_that_are_cached_count_against_the_room() -> None:
    pool, chain = BlockPool(4, 16), hashes(2)
    blocks = sealed(pool, chain)
    pool.release(blocks)
    assert pool.can_allocate(2, keep=blocks)
    assert not pool.can_allocate(3, keep=blocks)


def test_the_first_of_two_equal_blocks_keeps_the_identity() -> None:
    pool, chain = BlockPool(4, 16), hashes(1)
    first, second = sealed(pool, chain), sealed(pool, chain)
    pool.release(second)
    assert pool.match(chain) == first
    pool.check_integrity([first])


def test_releasing_twice_is_a_programmers_error() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(blocks)


def test_integrity_finds_a_leaked_block() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="references"):
        pool.check_integrity([])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_random_use_never_loses_or_shares_a_block_wrongly(seed: int) -> None:
    rng, pool, tables = random.Random(seed), BlockPool(24, 16), []
    resident: set[bytes] = set()
    for _ in range(120):
        chain = hashes(rng.randint(1, 8), first=100 * rng.randint(0, 4))
        matched = pool.match(chain)
        if rng.random() < 0.6 and pool.can_allocate(len(chain) - len(matched), keep=matched):
            pool.acquire(matched)
            table = [*matched, *pool.allocate(len(chain) - len(matched))]
            for block, block_hash in zip(table, chain, strict=True):
                pool.seal(block, block_hash)
            tables.append(table)
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        stored, evicted = pool.take_changes()
        assert not {link.hash for link in stored} & set(evicted)
        resident = resident - set(evicted) | {link.hash for link in stored}
        pool.check_integrity(tables)
    assert resident == {
        block_hash for first in range(5) for block_hash in hashes(8, 100 * first) if pool.match([block_hash])
    }
