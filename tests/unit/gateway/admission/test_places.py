"""Where a sequence can begin soon: the router chooses among those with a short queue and enough blocks."""

import pytest

from router.state import RouteOptions, RouteRequest
from router.step_model import StepModel
from services.core.clock import ManualClock
from services.gateway.admission.places import Lack, PlaceLimits
from services.gateway.cluster.cluster_view import Located
from tests.unit.gateway.gateway_parts import GatewayParts
from tests.unit.gateway.scripted_worker_server import report

SPEED = StepModel(step=0.0, token=1.0, sequence=1.0)
NOWHERE = Located({}, {})
LONG = RouteRequest(prompt_tokens=600, max_tokens=20)


class Cluster(GatewayParts):
    def __init__(self, **options) -> None:
        super().__init__(ManualClock(), options=RouteOptions(**options), places=PlaceLimits(200.0))

    async def find(self, request: RouteRequest, *workers, located: Located = NOWHERE):
        await self.hear(*workers)
        found = self.places.find(request, located)
        return found if isinstance(found, Lack) else (found.prefill, found.decode)


def prefill(name: str, queued: int = 0, **changes):
    return report(name, "prefill", model=SPEED, queued_prefill_tokens=queued, **changes)


def decode(name: str = "d", **changes):
    return report(name, "decode", model=SPEED, **changes)


async def test_a_prompt_does_not_go_to_a_busy_decode_worker_because_the_prefill_workers_are_busy() -> None:
    assert await Cluster().find(LONG, prefill("p", 300), decode(running=2)) is Lack.QUEUE
    assert await Cluster().find(LONG, prefill("p", blocks_free=3), decode()) is Lack.BLOCKS


async def test_an_idle_decode_worker_helps_busy_prefill_workers() -> None:
    assert await Cluster().find(LONG, prefill("p", 300), decode()) == (None, "d")


async def test_without_prefill_workers_it_does() -> None:
    assert await Cluster().find(LONG, decode()) == (None, "d")
    assert await Cluster().find(LONG, decode(queued_prefill_tokens=300)) is Lack.QUEUE


async def test_an_idle_worker_is_taken_while_another_one_is_busy() -> None:
    assert await Cluster().find(LONG, prefill("busy", 300), prefill("idle"), decode()) == ("idle", "d")


async def test_a_busy_worker_that_has_the_prompt_cached_is_worth_the_wait() -> None:
    """There it takes 300 ms + 8, elsewhere 600."""
    cached = Located({"busy": 592}, {})
    workers = prefill("busy", 300), prefill("idle"), decode()
    assert await Cluster(fetch=False).find(LONG, *workers, located=cached) == ("busy", "d")
    assert await Cluster(fetch=False, policy="least_loaded").find(LONG, *workers, located=cached) == (
        *("idle", "d"),
    )


async def test_one_token_needs_no_decode_worker_s_blocks() -> None:
    one = RouteRequest(prompt_tokens=600, max_tokens=1)
    assert await Cluster().find(one, prefill("p"), decode(blocks_free=0)) == ("p", None)


@pytest.mark.parametrize("changes", [{"state": "draining"}, {"state": "stalled"}])
async def test_a_worker_that_takes_no_work_is_no_worker(changes) -> None:
    assert await Cluster().find(LONG, prefill("p"), decode(**changes)) is Lack.WORKER


async def test_excluded_workers_are_lacking_and_not_full() -> None:
    excluding = RouteRequest(prompt_tokens=600, max_tokens=20, excluded=frozenset({"d"}))
    assert await Cluster().find(excluding, prefill("p"), decode()) is Lack.WORKER


async def test_choices_need_a_slot_each_and_more_than_there_are_an_idle_worker() -> None:
    def choices(count: int) -> RouteRequest:
        return RouteRequest(prompt_tokens=16, max_tokens=10, choices=count)

    some = decode(running=3, waiting=2, sequences_max=8)
    assert await Cluster().find(choices(3), some) == (None, "d")
    assert await Cluster().find(choices(4), some) is Lack.BLOCKS
    assert await Cluster().find(choices(9), decode(sequences_max=8)) == (None, "d")


async def test_other_gateways_answers_are_expected_to_grow_too() -> None:
    """20 of them, each half of 128 tokens: 4 blocks each."""
    request = RouteRequest(prompt_tokens=16, max_tokens=128)
    free = 20 * 4 + 9
    assert await Cluster().find(request, decode(running=20, blocks_free=free)) == (None, "d")
    assert await Cluster().find(request, decode(running=20, blocks_free=free - 1)) is Lack.BLOCKS
