"""What this gateway's own requests put into caches: expected while computed, kept for when Redis is away."""

import sys
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.block_hash import chain_hashes
from services.core.clock import ManualClock
from services.core.worker_report import WorkerKey
from services.gateway.cluster.expected_cache import (
    BLOCKS_KEPT,
    HOLDERS_KEPT,
    PUBLISHED_S,
    ExpectedCache,
    Leading,
)
from services.gateway.workers.worker_client import OutputToken, PrefillResult, Reserved, Started

P, D = WorkerKey("p", 1), WorkerKey("d", 2)
PREFILLED, STARTED, TOKEN = PrefillResult((), 0, 0.0, 0.0), Started(0, 0.0, 0, 0.0, 0.0), OutputToken(0, 5)


def chain(*tokens: int) -> list[bytes]:
    """One block per token."""
    return chain_hashes(tokens, 1, b"root")


LONG, BRANCH, OTHER = chain(1, 2, 3, 4), chain(1, 2, 9), chain(7, 8)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(50.0)


@pytest.fixture
def cache(clock) -> ExpectedCache:
    return ExpectedCache(clock)


def expected(cache: ExpectedCache, blocks: list[bytes]) -> dict[str, Leading]:
    return {key.worker_id: leading for key, leading in cache.expected(blocks, [P, D]).items()}


def test_a_prefill_worker_is_expected_to_hold_what_it_will_compute(cache) -> None:
    with cache.noted((P, LONG), (D, LONG)) as noted:
        assert expected(cache, LONG) == {"p": (0, 4)}, "the decode worker has taken its blocks already"
        assert expected(cache, BRANCH) == {"p": (0, 2)}
        assert expected(cache, [*LONG, b"more"]) == {"p": (0, 4)}
        assert expected(cache, OTHER) == {}
        noted.see(Reserved())
        assert expected(cache, LONG) == {"p": (0, 4)}
        noted.see(PREFILLED)
        assert expected(cache, LONG) == {"p": (4, 4)}
        noted.see(STARTED)
        assert expected(cache, BRANCH) == {"p": (2, 2), "d": (2, 2)}


def test_a_decode_worker_alone_is_expected_to_hold_what_it_will_compute(cache) -> None:
    with cache.noted(None, (D, LONG)) as noted:
        assert expected(cache, LONG) == {"d": (0, 4)}
        noted.see(STARTED)
        assert expected(cache, LONG) == {"d": (0, 4)}, "it has room, and computes"
        noted.see(TOKEN)
        assert expected(cache, LONG) == {"d": (4, 4)}


def test_a_request_for_one_token_leaves_its_prompt_on_the_prefill_worker(cache) -> None:
    with cache.noted((P, LONG), None) as noted:
        noted.see(PREFILLED)
    assert expected(cache, LONG) == {"p": (4, 4)}


@pytest.mark.parametrize("seen", [[], [Reserved()], [STARTED]], ids=["nothing", "reserved", "started"])
def test_what_an_attempt_did_not_finish_is_not_expected_any_more(cache, seen) -> None:
    with cache.noted((P, LONG), (D, LONG)) as noted:
        for event in seen:
            noted.see(event)
    held = {"d": (4, 4)} if seen == [STARTED] else {}
    assert expected(cache, LONG) == held
    assert cache.kept(LONG, [P, D]) == {P: 0, D: 4 if held else 0}


def test_one_that_fails_takes_nothing_from_others_that_go_on(cache) -> None:
    with cache.noted((P, LONG), None):
        with cache.noted((P, BRANCH), None):
            assert expected(cache, BRANCH) == {"p": (0, 3)}
        assert expected(cache, BRANCH) == {"p": (0, 2)}
        with cache.noted((P, LONG), None):
            pass
        assert expected(cache, LONG) == {"p": (0, 4)}


def test_the_index_is_believed_alone_once_it_must_know(cache, clock) -> None:
    with cache.noted((P, LONG), (D, LONG)) as noted:
        noted.see(PREFILLED)
        clock.advance(PUBLISHED_S / 2)
        noted.see(STARTED)
        noted.see(TOKEN)
        clock.advance(PUBLISHED_S / 2)
        assert expected(cache, LONG) == {"d": (4, 4)}
        clock.advance(PUBLISHED_S / 2)
        assert expected(cache, LONG) == {}
    assert cache.kept(LONG, [P, D]) == {P: 4, D: 4}


def test_another_incarnation_of_a_worker_holds_nothing(cache) -> None:
    with cache.noted((P, LONG), None) as noted:
        assert cache.expected(LONG, [WorkerKey("p", 9)]) == {}
        noted.see(PREFILLED)
    assert cache.kept(LONG, [WorkerKey("p", 9)]) == {WorkerKey("p", 9): 0}


def put(cache: ExpectedCache, worker: WorkerKey, blocks: list[bytes]) -> None:
    with cache.noted((worker, blocks), None) as noted:
        noted.see(PREFILLED)


def test_an_incarnation_replaces_the_one_before(cache) -> None:
    again = WorkerKey("p", 9)
    put(cache, P, LONG)
    put(cache, again, BRANCH)
    assert cache.kept(LONG, [P, again]) == {P: 4, again: 2}
    assert cache.kept(BRANCH, [P, again]) == {P: 0, again: 3}


def test_what_was_used_least_is_forgotten_first_and_tails_before_heads(clock) -> None:
    cache = ExpectedCache(clock, blocks_kept=6)
    put(cache, P, LONG)
    put(cache, P, OTHER)
    assert cache.kept(LONG, [P]) == {P: 4}
    put(cache, P, BRANCH)
    assert cache.kept(LONG, [P]) == {P: 3}, "the head was used again, the tail was not"
    assert cache.kept(BRANCH, [P]) == {P: 3}
    assert cache.kept(OTHER, [P]) == {P: 2}


def test_a_block_that_many_workers_get_is_kept_for_the_last_of_them(cache, clock) -> None:
    workers = [WorkerKey(f"p{n}", n) for n in range(HOLDERS_KEPT + 3)]
    for worker in workers:
        put(cache, worker, LONG)
    assert cache.expected(LONG, workers) == dict.fromkeys(workers, (4, 4)), "the index knows of none"
    clock.advance(PUBLISHED_S)
    put(cache, workers[-1], LONG)
    kept = cache.kept(LONG, workers)
    assert [worker for worker in workers if kept[worker]] == workers[3:]


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=5), st.booleans()),
        max_size=12,
    ),
    st.lists(st.integers(0, 2), min_size=1, max_size=5),
)
def test_expectations_are_those_of_a_plain_search(attempts, asked) -> None:
    cache, workers = ExpectedCache(ManualClock(0.0)), [WorkerKey(f"p{n}", n) for n in range(3)]
    wanted = {}
    with ExitStack() as stack:
        for number, tokens, done in attempts:
            noted = stack.enter_context(cache.noted((workers[number], chain(*tokens)), None))
            if done:
                noted.see(PREFILLED)
            common = next((n for n, (a, b) in enumerate(zip(tokens, asked)) if a != b), None)  # noqa: B905
            blocks = min(len(tokens), len(asked)) if common is None else common
            there, coming = wanted.get(workers[number], (0, 0))
            wanted[workers[number]] = (max(there, blocks if done else 0), max(coming, blocks))
        found = cache.expected(chain(*asked), workers)
        assert {w: tuple(found.get(w, (0, 0))) for w in workers} == {
            w: wanted.get(w, (0, 0)) for w in workers
        }
        done_only = {w: there for w, (there, _) in wanted.items()}
        assert cache.kept(chain(*asked), workers) == {w: done_only.get(w, 0) for w in workers}


def test_memory_is_bounded_whatever_is_routed(clock) -> None:
    cache = ExpectedCache(clock, blocks_kept=1000)
    for number in range(300):
        with cache.noted((P, chain(number, *range(20))), (D, chain(number, *range(20)))) as noted:
            noted.see(PREFILLED)
            noted.see(STARTED)
        clock.advance(PUBLISHED_S / 10)
    assert len(cache._kept) == 1000
    assert cache._parts == {}


def test_a_full_memory_takes_as_many_bytes_as_its_bound_says() -> None:
    cache = ExpectedCache(ManualClock(0.0))
    hashes = [number.to_bytes(16, "little") for number in range(BLOCKS_KEPT + 100)]
    put(cache, P, hashes)
    put(cache, D, hashes)
    holders = {id(names): sys.getsizeof(names) for names in cache._kept.values()}
    each = sys.getsizeof(hashes[0])
    total = sys.getsizeof(cache._kept) + len(cache._kept) * each + sum(holders.values())
    assert len(cache._kept) == BLOCKS_KEPT
    assert total < 13e6
