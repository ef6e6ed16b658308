"""What the gateway believes about the cluster, also while Redis is away or has lost everything."""

import logging

import pytest
from msgspec.structs import replace

from router.state import Offer, Route
from router.step_model import StepModel
from services.core.block_hash import Compatibility, chain_hashes, chain_root
from services.core.clock import ManualClock
from services.core.worker_report import sequence_tag
from services.gateway.cluster import cluster_view
from services.gateway.cluster.cluster_view import (
    INDEX_PAUSE_S,
    LEASE_GRACE_S,
    REPUBLISH_S,
    SILENT_S,
    SUSPICION_S,
    ClusterView,
)
from services.gateway.cluster.expected_cache import PUBLISHED_S
from services.gateway.workers.memory_worker_client import MemoryWorkerClient
from services.gateway.workers.worker_client import OutputToken, PrefillResult, Started
from services.index.memory_index import MemoryPrefixIndex
from services.membership.memory_membership import MemoryMembership
from tests.unit.gateway.scripted_worker_server import report

D1, D2 = report("d1", "decode"), report("d2", "decode")


class World:
    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.membership = MemoryMembership(self.clock, ttl_s=1.0)
        self.index = MemoryPrefixIndex(self.clock, ttl_s=1e9)
        self.workers = MemoryWorkerClient(lambda prompt: [1])
        self.view = ClusterView(self.membership, self.index, self.workers, self.clock, D1.served_model)

    async def announce(self, *reports) -> None:
        for worker in reports:
            await self.membership.announce(worker)
        await self.view.refresh()

    @property
    def ids(self) -> list[str]:
        return [worker.worker_id for worker in self.view.reports]


@pytest.fixture
def world() -> World:
    return World()


async def test_a_worker_is_kept_for_a_grace_time_and_then_dropped(world) -> None:
    await world.announce(D1)
    world.clock.advance(LEASE_GRACE_S)
    await world.view.refresh()
    assert world.ids == ["d1"]
    world.clock.advance(0.1)
    await world.view.refresh()
    assert world.ids == []
    assert not world.view.ready


async def test_a_restarted_redis_that_knows_nobody_empties_nothing(world) -> None:
    await world.announce(D1, D2)
    world.membership.lose_everything()
    await world.view.refresh()
    assert world.ids == ["d1", "d2"]
    world.clock.advance(0.25)
    await world.announce(D1)
    assert world.view.ready


async def test_no_time_counts_while_redis_is_away(world) -> None:
    await world.announce(D1)
    world.membership.available = False
    for _ in range(3):
        world.clock.advance(10 * LEASE_GRACE_S)
        await world.view.refresh()
    assert world.ids == ["d1"]
    world.membership.available = True
    await world.view.refresh()
    assert world.ids == ["d1"], "workers need a moment to announce themselves again"
    world.clock.advance(LEASE_GRACE_S + 0.1)
    await world.view.refresh()
    assert world.ids == []


async def test_a_new_incarnation_replaces_the_old_one_at_once(world) -> None:
    await world.announce(D1)
    await world.announce(report("d1", "decode", epoch=2))
    assert [worker.epoch for worker in world.view.reports] == [2]


async def test_workers_of_another_model_are_not_seen(world) -> None:
    await world.announce(D1, report("d2", "decode", served_model="other"))
    assert world.ids == ["d1"]


async def test_a_worker_of_another_model_is_told_of_once_until_it_changes(world, caplog) -> None:
    caplog.set_level(logging.WARNING)
    for model in ("x", "x", "y"):
        await world.announce(D1, report("d2", "decode", served_model=model))
    ours = D1.served_model
    assert [record.getMessage() for record in caplog.records] == [
        f"worker d2 is left out: it serves '{model}', this gateway serves '{ours}'" for model in ("x", "y")
    ]


async def test_workers_between_which_no_kv_can_move_are_told_of_once(world, caplog) -> None:
    caplog.set_level(logging.WARNING)
    exact = D1.compatibility
    quantised = report("p1", "prefill", compatibility=replace(exact, quantization="w4w8a8-g32"))
    await world.announce(D1, quantised)
    await world.announce(D1, quantised)
    why = f"quantization: w4w8a8-g32 != {exact.quantization}"
    assert world.view.unpaired["p1"] == f"no KV can move between it and d1: {why}"
    assert [r.getMessage().partition(" ")[0] for r in caplog.records] == ["d1", "p1"]
    assert why in caplog.records[1].getMessage()
    await world.announce(D1, report("p1", "prefill"))
    assert world.view.unpaired == {}


@pytest.mark.parametrize(
    ("changes", "ready"),
    [
        ({}, True),
        ({"role": "both"}, True),
        ({"role": "prefill"}, False),
        ({"state": "draining"}, False),
        ({"state": "stalled"}, False),
    ],
)
async def test_ready_means_a_ready_decode_worker(world, changes, ready) -> None:
    await world.announce(report("w", changes.pop("role", "decode"), **changes))
    assert world.view.ready is ready


async def test_a_suspect_is_not_offered_for_a_moment(world) -> None:
    await world.announce(D1, D2)
    world.view.suspect(D1.key)
    assert {view.id: view.ready for view in world.view.worker_views()} == {"d1": False, "d2": True}
    world.clock.advance(SUSPICION_S + 0.1)
    assert all(view.ready for view in world.view.worker_views())


def ready(world: World) -> dict[str, bool]:
    return {view.id: view.ready for view in world.view.worker_views()}


async def test_a_suspect_stays_one_while_redis_is_away_and_for_a_moment_after(world) -> None:
    """It was killed just before Redis was, say: nobody will tell that it is gone."""
    await world.announce(D1, D2)
    world.membership.available = False
    await world.view.refresh()
    world.view.suspect(D1.key)
    world.clock.advance(10 * SUSPICION_S)
    assert ready(world) == {"d1": False, "d2": True}
    world.membership.available = True
    await world.announce(D2)
    assert ready(world) == {"d1": False, "d2": True}
    world.clock.advance(SUSPICION_S + 0.1)
    await world.announce(D2)
    assert ready(world) == {"d2": True}


async def test_while_redis_is_away_a_suspect_that_nobody_can_replace_is_tried_again(world) -> None:
    await world.announce(D1, D2, report("p", "prefill"))
    world.membership.available = False
    await world.view.refresh()
    for suspect in (D1, D2, report("p", "prefill")):
        world.view.suspect(suspect.key)
    assert not any(ready(world).values())
    world.clock.advance(SUSPICION_S + 0.1)
    assert all(ready(world).values())


@pytest.mark.parametrize("state", ["draining", "stalled"])
async def test_while_redis_is_away_a_worker_that_takes_no_work_replaces_no_suspect(world, state) -> None:
    await world.announce(D1, report("d2", "decode", state=state))
    world.membership.available = False
    await world.view.refresh()
    world.view.suspect(D1.key)
    world.clock.advance(SUSPICION_S + 0.1)
    assert ready(world) == {"d1": True, "d2": False}


async def test_while_redis_is_away_a_silent_worker_replaces_no_suspect(world) -> None:
    await world.announce(report("d1", "decode", beat=1), report("d2", "decode", beat=1))
    world.clock.advance(SILENT_S + 0.1)
    await world.announce(report("d1", "decode", beat=2), report("d2", "decode", beat=1))
    world.membership.available = False
    await world.view.refresh()
    world.view.suspect(D1.key)
    world.clock.advance(SUSPICION_S + 0.1)
    assert ready(world) == {"d1": True, "d2": False}


async def offered(world: World, beat: int, after_s: float) -> bool:
    """Whether d1 is offered when its report with `beat` is read after some more time."""
    world.clock.advance(after_s)
    await world.announce(report("d1", "decode", beat=beat))
    return world.view.worker_views()[0].ready


async def test_a_suspect_that_reports_again_is_offered_again(world) -> None:
    assert await offered(world, beat=1, after_s=0.0)
    world.view.suspect(D1.key)
    assert not await offered(world, beat=2, after_s=0.1), "this report may be older than the suspicion"
    assert not await offered(world, beat=2, after_s=0.9)
    assert await offered(world, beat=3, after_s=0.1)


async def test_a_worker_whose_reports_stop_changing_is_not_offered_until_they_do(world) -> None:
    assert await offered(world, beat=1, after_s=0.0)
    assert await offered(world, beat=1, after_s=SILENT_S)
    assert not await offered(world, beat=1, after_s=0.1)
    assert await offered(world, beat=2, after_s=0.1)


async def test_nobody_is_silent_while_redis_is_away(world) -> None:
    await world.announce(report("d1", "decode", beat=1))
    world.membership.available = False
    world.clock.advance(10.0)
    await world.view.refresh()
    assert world.view.worker_views()[0].ready
    world.membership.available = True
    assert await offered(world, beat=1, after_s=0.1)


async def test_a_report_becomes_a_view_with_the_same_numbers(world) -> None:
    worker = report(
        "w",
        "both",
        blocks_free=10,
        blocks_cached=5,
        running=3,
        waiting=2,
        queued_prefill_tokens=70,
        queued_prefill_context=7_000,
        running_context=300,
        model=StepModel(step=20.0, token=1.5),
    )
    await world.announce(worker)
    (view,) = world.view.worker_views()
    assert (view.id, view.prefills, view.decodes, view.ready) == ("w", True, True, True)
    assert (view.blocks_available, view.block_size, view.running, view.waiting) == (15, 16, 3, 2)
    assert (view.queued_prefill_tokens, view.queued_prefill_context, view.running_context) == (70, 7_000, 300)
    assert view.model == StepModel(step=20.0, token=1.5)


async def test_only_compatible_workers_get_equal_keys(world) -> None:
    other = Compatibility(model="m", revision="r2", layout="l")
    await world.announce(D1, D2, report("d3", "decode", compatibility=other))
    first, second, third = (view.compatibility for view in world.view.worker_views())
    assert first == second != third


async def test_workers_that_differ_only_in_their_block_size_can_be_paired(world) -> None:
    small = Compatibility(model="m", revision="r", layout="l", block_size=4)
    await world.announce(D1, report("d3", "decode", compatibility=small))
    first, second = (view.compatibility for view in world.view.worker_views())
    assert first == second


class TestLocate:
    async def test_caches_are_found_per_block_size_and_given_in_tokens(self, world) -> None:
        small = Compatibility(model="m", revision="r", layout="l", block_size=4)
        d3 = report("d3", "decode", compatibility=small)
        await world.announce(D1, D2, d3)
        tokens = list(range(40))
        for worker, blocks in ((D1, 2), (D2, 1), (d3, 7)):
            root = chain_root(worker.compatibility, "salt")
            hashes = chain_hashes(tokens, worker.compatibility.block_size, root)
            await world.index.begin(worker.key)
            await world.index.publish(worker.key, hashes[:blocks], [])
        assert await world.view.locate(tokens, "salt") == ({"d1": 32, "d2": 16, "d3": 28}, {})
        assert set((await world.view.locate(tokens, "other tenant")).cached.values()) == {0}

    async def test_the_same_tokens_and_salt_are_hashed_only_once(self, world, monkeypatch) -> None:
        hashed: list[int] = []

        def counting(tokens, block_size, root):
            hashed.append(len(tokens))
            return chain_hashes(tokens, block_size, root)

        monkeypatch.setattr(cluster_view, "chain_hashes", counting)
        await world.announce(D1, D2)
        tokens = list(range(40))
        await world.index.begin(D1.key)
        await world.index.publish(D1.key, chain_hashes(tokens, 16, chain_root(D1.compatibility, "salt")), [])
        for _ in range(3):
            assert await world.view.locate(list(tokens), "salt") == ({"d1": 32, "d2": 0}, {})
        assert hashed == [40]
        await world.view.locate(tokens, "other tenant")
        await world.view.locate([*tokens, 40], "salt")
        assert hashed == [40, 40, 41]

    async def test_a_prompt_below_a_block_is_not_looked_up(self, world) -> None:
        await world.announce(D1)
        world.index.available = False
        assert await world.view.locate([1, 2, 3], "") == ({}, {})

    async def test_without_redis_nothing_is_cached_and_nothing_fails(self, world) -> None:
        await world.announce(D1)
        world.index.available = False
        assert await world.view.locate(list(range(40)), "") == ({"d1": 0}, {})

    async def test_an_index_that_does_not_answer_is_not_waited_for_by_every_request(self, world) -> None:
        await world.announce(D1)
        tokens = list(range(40))
        await world.index.begin(D1.key)
        await world.index.publish(D1.key, chain_hashes(tokens, 16, chain_root(D1.compatibility, "")), [])
        world.index.available = False
        assert await world.view.locate(tokens, "") == ({"d1": 0}, {})
        world.index.available = True
        assert await world.view.locate(tokens, "") == ({"d1": 0}, {}), "not asked again yet"
        world.clock.advance(INDEX_PAUSE_S)
        assert await world.view.locate(tokens, "") == ({"d1": 32}, {})

    async def test_what_is_being_computed_counts_before_the_index_shows_it(self, world) -> None:
        small = Compatibility(model="m", revision="r", layout="l", block_size=4)
        d3 = report("d3", "decode", compatibility=small)
        await world.announce(report("p", "prefill"), D1, d3)
        tokens = list(range(40))
        nothing = {"p": 0, "d1": 0, "d3": 0}
        with world.view.expecting(report("p", "prefill"), d3, tokens, "salt") as noted:
            assert await world.view.locate([*tokens[:30], 7], "salt") == (nothing, {"p": 16})
            assert await world.view.locate(tokens, "other tenant") == (nothing, {})
            noted.see(PrefillResult((), 0, 0.0, 0.0))
            assert await world.view.locate(tokens, "salt") == ({**nothing, "p": 32}, {})
            noted.see(Started(0, 0.0, 0, 0.0, 0.0))
            assert await world.view.locate(tokens, "salt") == ({"p": 32, "d1": 0, "d3": 40}, {})
        world.clock.advance(PUBLISHED_S)
        assert await world.view.locate(tokens, "salt") == (nothing, {})

    async def test_the_index_and_what_is_expected_are_merged_by_the_longer(self, world) -> None:
        await world.announce(D1)
        tokens = list(range(64))
        hashes = chain_hashes(tokens, 16, chain_root(D1.compatibility, ""))
        with world.view.expecting(None, D1, tokens[:32], ""):
            assert await world.view.locate(tokens, "") == ({"d1": 0}, {"d1": 32})
            await world.index.begin(D1.key)
            await world.index.publish(D1.key, hashes[:1], [])
            assert await world.view.locate(tokens, "") == ({"d1": 16}, {"d1": 32})
            await world.index.begin(D1.key)
            await world.index.publish(D1.key, hashes[:3], [])
            assert await world.view.locate(tokens, "") == ({"d1": 48}, {})

    async def served(self, world) -> list[int]:
        """A prompt that was computed on d1, long ago."""
        await world.announce(D1, D2)
        tokens = list(range(64))
        with world.view.expecting(None, D1, tokens, "") as noted:
            noted.see(OutputToken(0, 5))
        world.clock.advance(10 * PUBLISHED_S)
        await world.announce(D1, D2)
        return tokens

    @pytest.mark.parametrize("both", [False, True])
    async def test_while_redis_is_away_what_was_served_before_is_still_found(self, world, both) -> None:
        tokens = await self.served(world)
        world.index.available = False
        world.membership.available = not both
        await world.view.refresh()
        assert await world.view.locate(tokens, "") == ({"d1": 64, "d2": 0}, {})
        assert await world.view.locate([*tokens[:40], 7], "") == ({"d1": 32, "d2": 0}, {})

    async def test_while_redis_answers_what_a_worker_evicted_is_not_there(self, world) -> None:
        tokens = await self.served(world)
        assert await world.view.locate(tokens, "") == ({"d1": 0, "d2": 0}, {})

    async def test_when_redis_is_back_the_snapshot_serves_until_workers_have_published_again(
        self, world
    ) -> None:
        tokens = await self.served(world)
        world.membership.available = False
        await world.view.refresh()
        world.membership.available = True
        await world.announce(D1, D2)
        hashes = chain_hashes(tokens, 16, chain_root(D2.compatibility, ""))
        await world.index.begin(D2.key)
        await world.index.publish(D2.key, hashes[:2], [])
        assert await world.view.locate(tokens, "") == ({"d1": 64, "d2": 32}, {})
        world.clock.advance(REPUBLISH_S)
        assert await world.view.locate(tokens, "") == ({"d1": 0, "d2": 32}, {})

    async def test_an_index_that_answers_again_is_not_believed_alone_at_once(self, world) -> None:
        tokens = await self.served(world)
        world.index.available = False
        await world.view.locate(tokens, "")
        world.index.available = True
        world.index.lose_everything()
        for found in (64, 0):
            world.clock.advance(INDEX_PAUSE_S)
            await world.announce(D1, D2)
            assert await world.view.locate(tokens, "") == ({"d1": found, "d2": 0}, {})
            world.clock.advance(REPUBLISH_S)

    async def test_another_incarnation_has_lost_its_cache_also_while_redis_is_away(self, world) -> None:
        tokens = await self.served(world)
        await world.announce(report("d1", "decode", epoch=2))
        world.index.available = False
        assert await world.view.locate(tokens, "") == ({"d1": 0, "d2": 0}, {})


async def test_views_show_what_the_workers_have_to_do_now(world) -> None:
    busy = report(
        "p1", "prefill", queued_prefill_tokens=1_000, model=StepModel(token=1.0), load_age_ms=100.0, beat=1
    )
    await world.announce(busy)
    world.clock.advance(0.2)
    (view,) = world.view.worker_views()
    assert view.queued_prefill_tokens == 700  # at a token a millisecond


async def test_a_report_says_which_of_our_sequences_it_counts(world) -> None:
    await world.announce(report("d1", "decode", beat=1))
    (view,) = world.view.worker_views()
    offer = Offer(worker=view, part="decode", cached_tokens=0)
    with world.view.in_flight.sent(Route((offer,), (offer,)), "r-1", 40, 1):
        assert [view.running for view in world.view.worker_views()] == [1]
        await world.announce(report("d1", "decode", running=5, newest=[sequence_tag("other")], beat=2))
        assert [view.running for view in world.view.worker_views()] == [6]
        await world.announce(report("d1", "decode", running=6, newest=[sequence_tag("r-1")], beat=3))
        assert [view.running for view in world.view.worker_views()] == [6]
