"""One attempt: events in index order, whatever order the two workers deliver them in."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.clock import SystemClock
from services.core.errors import EngineFailed, NoWorker
from services.gateway.admission.place_queue import WaitLimits
from services.gateway.admission.places import PlaceLimits
from services.gateway.path.choices import Choices
from services.gateway.path.generation import Routed, WorkerPair
from services.gateway.path.pipeline import IndexOrder
from services.gateway.workers.memory_worker_client import Fault
from services.gateway.workers.worker_client import OutputToken, PrefillResult, Started
from tests.unit.gateway.gateway_parts import GatewayParts, sequence
from tests.unit.gateway.scripted_worker_server import report

STARTED = Started(0, 0.0, 0, 0.0, 0.0)


async def flat(bursts) -> list:
    return [event async for burst in bursts for event in burst]


def ordered(events, next_index: int = 0) -> list:
    choices = Choices(1)
    choices.delivered[0] = [0] * next_index
    order = IndexOrder(choices)
    return [given for event in events for given in order.of([event])]


def tokens_of(events) -> list[int]:
    return [event.index for event in events if isinstance(event, OutputToken)]


def test_a_second_token_that_comes_first_waits_for_the_first() -> None:
    first = PrefillResult((OutputToken(0, 50),), 3, 1.0, 2.0)
    events = [STARTED, OutputToken(1, 51), first, OutputToken(2, 52, "length")]
    assert ordered(events) == [
        STARTED,
        first,
        OutputToken(0, 50),
        OutputToken(1, 51),
        OutputToken(2, 52, "length"),
    ]


def test_nothing_follows_the_token_that_ends_the_answer() -> None:
    events = [OutputToken(0, 1), OutputToken(1, 2, "stop"), OutputToken(2, 3)]
    assert tokens_of(ordered(events)) == [0, 1]


def test_tokens_before_the_resumed_point_are_dropped() -> None:
    assert tokens_of(ordered([OutputToken(n, n) for n in range(6)], next_index=4)) == [4, 5]


def test_each_choice_has_an_order_and_an_end_of_its_own() -> None:
    choices = Choices(2)
    firsts = (OutputToken(0, 10, None, 0), OutputToken(0, 20, None, 1))
    ends = OutputToken(2, 12, "stop", 0), OutputToken(2, 22, "length", 1)
    events = [OutputToken(1, 21, None, 1), PrefillResult(firsts, 0, 0.0, 0.0), ends[0]]
    events += [OutputToken(1, 11, None, 0), OutputToken(3, 13, None, 0), ends[1], OutputToken(3, 23, None, 1)]
    found = IndexOrder(choices).of(events)
    assert [(e.choice, e.token) for e in found if isinstance(e, OutputToken)] == [
        *((0, 10), (1, 20), (1, 21), (0, 11), (0, 12), (1, 22))
    ]
    assert choices.delivered == [[10, 11, 12], [20, 21, 22]]


def test_nothing_comes_of_a_choice_that_nobody_wants_any_more() -> None:
    choices = Choices(3)
    choices.close(2)
    given = []
    order = IndexOrder(choices)
    for event in [OutputToken(index, index, None, choice) for index in range(5) for choice in range(3)]:
        for token in order.of([event]):
            given.append((token.choice, token.index))
            if token.index == 1 + token.choice:
                choices.close(token.choice)
    assert given == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2)]


def test_what_comes_in_one_burst_leaves_in_one() -> None:
    first, order = PrefillResult((OutputToken(0, 50),), 3, 1.0, 2.0), IndexOrder(Choices(1))
    assert tokens_of(order.of([STARTED, OutputToken(1, 51), first, OutputToken(2, 52)])) == [0, 1, 2]
    assert tokens_of(order.of([OutputToken(3, 53, "length"), OutputToken(4, 54)])) == [3]


@given(st.lists(st.integers(0, 8), max_size=40), st.integers(0, 4))
def test_any_arrival_gives_consecutive_tokens_without_duplicates(indices, next_index) -> None:
    emitted = tokens_of(ordered([OutputToken(n, n) for n in indices], next_index))
    assert emitted == list(range(next_index, next_index + len(emitted)))
    assert next_index + len(emitted) not in indices


class World(GatewayParts):
    def __init__(self) -> None:
        any_queue = PlaceLimits(queue_ms_max=1e9)
        super().__init__(SystemClock(), places=any_queue, waits=WaitLimits(without_worker_s=0.05))

    async def attempt(self, *reports, excluded=(), **sampling) -> list:
        await self.hear(*reports)
        async with aclosing(self.events([1, 2, 3], excluded, **sampling)) as events:
            return await flat(events)

    def events(self, prompt_ids, excluded=(), **sampling) -> AsyncGenerator:
        wanted = msgspec.structs.replace(sequence(**sampling), prompt_ids=prompt_ids)
        return self.pipeline.attempt(self.ticket(wanted, excluded))


P, D = report("p", "prefill"), report("d", "decode")


async def test_a_split_attempt_dispatches_both_and_decode_names_its_source() -> None:
    world = World()
    routed, *events = await world.attempt(P, D)
    assert isinstance(routed, Routed)
    assert (routed.prefill, routed.decode, routed.kind) == (P, D, "split")
    assert tokens_of(events) == [0, 1, 2]
    assert {call.kind: call.source for call in world.workers.calls} == {"prefill": None, "decode": P.key}


async def test_without_any_worker_the_attempt_ends_with_no_worker() -> None:
    with pytest.raises(NoWorker):
        await World().attempt()


async def test_excluded_incarnations_are_not_used_and_later_ones_are() -> None:
    with pytest.raises(NoWorker):
        await World().attempt(D, excluded={D.key})
    routed, *_ = await World().attempt(report("d", "decode", epoch=2), excluded={D.key})
    assert routed.decode.epoch == 2


async def test_a_pair_is_avoided_until_one_of_the_two_is_another_incarnation() -> None:
    pair = WorkerPair(P.key, D.key)
    routed, *_ = await World().attempt(P, D, excluded={pair})
    assert routed.kind == "decode_alone"
    routed, *_ = await World().attempt(report("p", "prefill", epoch=2), D, excluded={pair})
    assert routed.kind == "split"


@pytest.mark.parametrize(("kind", "culprit"), [("prefill", P), ("decode", D)])
async def test_a_failure_names_the_worker_it_came_from(kind, culprit) -> None:
    world = World()
    world.workers.script(culprit.worker_id, kind, Fault(EngineFailed("boom")))
    world.workers.script(
        "p" if kind == "decode" else "d", "decode" if kind == "prefill" else "prefill", Fault()
    )
    *_, failed = await world.attempt(P, D)
    assert failed.culprit == culprit
    assert world.workers.running == []


async def test_an_attempt_that_ends_leaves_nothing_in_flight() -> None:
    world = World()
    await world.attempt(P, D)
    assert [view.running for view in world.view.worker_views()] == [0, 0]
    assert [view.queued_prefill_tokens for view in world.view.worker_views()] == [0, 0]
    assert len(world.places.commitments) == 0


PROMPT = list(range(500))
BUSY = report("busy", "prefill", queued_prefill_tokens=300)  # its queue is shorter than the prefix


async def routed(world: World, prompt_ids) -> str:
    """Where a request goes that leaves at once."""
    async with aclosing(world.events(prompt_ids)) as events:
        [placement] = await anext(events)
        return placement.prefill.worker_id


async def test_a_prefix_that_is_being_computed_draws_requests_until_it_fails() -> None:
    world = World()
    await world.hear(P, D, BUSY)
    world.workers.script("p", "prefill", Fault())
    async with aclosing(world.events(PROMPT)) as computing:
        assert [placement.prefill for placement in await anext(computing)] == [P]
        assert await routed(world, [*PROMPT[:480], 7, 7, 7]) == "p", (
            "its queue is 500 tokens, 480 of them ours"
        )
        assert await routed(world, [7, *PROMPT]) == "busy", "nobody has this prefix"
    world.view.suspect(P.key)
    assert await routed(world, PROMPT) == "busy"
    located = await world.view.locate(PROMPT, "")
    assert (located.cached, located.coming) == ({"p": 0, "d": 0, "busy": 0}, {})


async def test_what_an_attempt_has_computed_counts_before_any_report_or_index_tells() -> None:
    world = World()
    await world.hear(P, D, BUSY)
    async with aclosing(world.events(PROMPT)) as events:
        assert tokens_of(await flat(events)) == [0, 1, 2]
    located = await world.view.locate(PROMPT, "")
    assert (located.cached, located.coming) == ({"p": 496, "d": 496, "busy": 0}, {})
