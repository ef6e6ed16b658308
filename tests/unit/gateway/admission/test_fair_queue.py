"""Classes share by weight and tenants of a class equally, in tokens, whatever arrives."""

import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.admission.fair_queue import QUANTUM, WEIGHTS, FairQueue, Priority


@dataclass(frozen=True, eq=False)
class Item:
    tenant: str = ""
    cost: int = 100
    priority: Priority = Priority.NORMAL


def served(queue: FairQueue[Item], tokens: int) -> list[Item]:
    """Those that go until `tokens` tokens have gone."""
    gone: list[Item] = []
    while sum(item.cost for item in gone) < tokens and (head := queue.head()) is not None:
        queue.take(head)
        gone.append(head)
    return gone


def tokens_by(items: list[Item], attribute: str) -> Counter:
    counts: Counter = Counter()
    for item in items:
        counts[getattr(item, attribute)] += item.cost
    return counts


def test_one_tenant_goes_in_the_order_of_arrival() -> None:
    queue: FairQueue[Item] = FairQueue()
    items = [Item(cost=cost) for cost in (5, 900, 1, 30)]
    for item in items:
        queue.push(item)
    assert served(queue, 10**6) == items


def test_tenants_get_equal_tokens_though_one_sends_more_and_another_larger_requests() -> None:
    queue: FairQueue[Item] = FairQueue()
    rng = random.Random(1)
    for _ in range(3000):
        queue.push(Item("flood", rng.randint(50, 400)))
    for _ in range(1000):
        queue.push(Item("small", rng.randint(20, 100)))
    for _ in range(50):
        queue.push(Item("large", rng.randint(1000, 3000)))
    shares = tokens_by(served(queue, 90_000), "tenant")
    assert shares.keys() == {"flood", "small", "large"}
    for tokens in shares.values():
        assert tokens == pytest.approx(30_000, rel=0.05)


def test_classes_share_by_weight_and_the_lowest_does_not_starve() -> None:
    queue: FairQueue[Item] = FairQueue()
    for priority in Priority:
        for _ in range(3000):
            queue.push(Item(priority=priority))
    shares = tokens_by(served(queue, 210_000), "priority")
    for priority, weight in WEIGHTS.items():
        assert shares[priority] == pytest.approx(210_000 * weight / sum(WEIGHTS.values()), rel=0.02)


def test_a_class_that_was_empty_goes_next_but_has_saved_nothing_up() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(2000):
        queue.push(Item(priority=Priority.NORMAL))
    served(queue, 100_000)
    for _ in range(2000):
        queue.push(Item(priority=Priority.HIGH))
    gone = served(queue, 100_000)
    assert gone[0].priority is Priority.HIGH
    both = WEIGHTS[Priority.HIGH] + WEIGHTS[Priority.NORMAL]
    expected = 100_000 * WEIGHTS[Priority.NORMAL] / both
    assert tokens_by(gone, "priority")[Priority.NORMAL] == pytest.approx(expected, rel=0.05)


def test_a_class_that_is_passed_over_lets_the_others_go() -> None:
    queue: FairQueue[Item] = FairQueue()
    high, low = Item(priority=Priority.HIGH), Item(priority=Priority.LOW)
    queue.push(low)
    queue.push(high)
    assert queue.head() is high
    assert queue.head({Priority.HIGH}) is low
    assert queue.head(set(Priority)) is None


def test_a_newcomer_waits_for_its_share_not_for_the_whole_queue() -> None:
    queue: FairQueue[Item] = FairQueue()
    for _ in range(100):
        queue.push(Item("flood", 200))
    queue.push(Item("other", 200))
    assert "other" in [item.tenant for item in served(queue, 600)]


@pytest.mark.parametrize("priority", Priority)
@pytest.mark.parametrize("tenant", ["flood", "some", "new"])
def test_tokens_ahead_are_about_those_that_really_go_before(priority: Priority, tenant: str) -> None:
    queue: FairQueue[Item] = FairQueue()
    rng = random.Random(5)
    for one in Priority:
        for name, count in {"flood": 300, "some": 30, "few": 5}.items():
            for _ in range(count):
                queue.push(Item(name, rng.randint(50, 300), one))
    served(queue, 3000)
    mine = Item(tenant, 200, priority)
    expected = queue.tokens_ahead(priority, tenant, mine.cost)
    queue.push(mine)
    before = 0
    while (head := queue.head()) is not mine:
        assert head is not None
        before += head.cost
        queue.take(head)
    turns = 2 * QUANTUM * sum(WEIGHTS.values()) / WEIGHTS[priority]
    assert expected == pytest.approx(before, rel=0.1, abs=turns)


actions = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("abc"), st.integers(1, 5000), st.sampled_from(Priority)),
        st.sampled_from(["take", "remove", "peek"]),
    ),
    max_size=60,
)


@given(actions, st.randoms(use_true_random=False))
def test_everybody_leaves_exactly_once_and_deficits_stay_bounded(actions, rng: random.Random) -> None:
    queue: FairQueue[Item] = FairQueue()
    inside: list[Item] = []

    def leave(item: Item) -> None:
        inside.remove(item)  # fails if it was not there

    for action in [*actions, *["take"] * len(actions)]:
        if isinstance(action, tuple):
            item = Item(*action)
            inside.append(item)
            queue.push(item)
        elif action == "remove" and inside:
            item = rng.choice(inside)
            queue.remove(item)
            leave(item)
        elif (head := queue.head()) is not None:
            assert queue.head() is head, "asking twice changes nothing"
            if action == "take":
                queue.take(head)
                leave(head)
        assert len(queue) == len(inside)
        assert sorted(map(id, queue)) == sorted(map(id, inside))
        for priority in Priority:
            assert queue.tokens(priority) == sum(i.cost for i in inside if i.priority is priority)
        check_deficits(queue)
    assert inside == []


def check_deficits(queue: FairQueue[Item]) -> None:
    for one in queue._classes.values():
        for tenant in one.tenants.values():
            assert 0 <= tenant.deficit < 5000 + QUANTUM
            assert tenant.tokens == sum(item.cost for item in tenant.items) > 0
