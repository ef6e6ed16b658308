"""A simulated cluster loses no request and no work, and a seed repeats it."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from router.state import RouteOptions
from tests.bench.routing.life import Life
from tests.bench.routing.simulation import ClusterSpec, Simulation, simulate
from tests.bench.routing.step_table import read_table
from tests.bench.routing.timeline import Timeline, immediate
from tests.bench.routing.traces import Request

BLOCK_SIZE = 32
SPEC = ClusterSpec(prefill=2, decode=2, blocks=400)


def requests(count: int, rate: float, seed: int = 0) -> list[Request]:
    """Three in four begin with one of a few prefixes."""
    rng = random.Random(seed)
    at_s, made = 0.0, []
    for number in range(count):
        at_s += rng.expovariate(rate)
        blocks = rng.randint(1, 20)
        prefix = (rng.randrange(5), 7, 8, 9) if rng.random() < 0.75 else ()
        content = (*prefix, *range(1000 * (number + 1), 1000 * (number + 1) + blocks))
        tokens = len(content) * BLOCK_SIZE - rng.randrange(BLOCK_SIZE)
        made.append(Request(at_s, tokens, rng.randint(2, 12), content))
    return made


def run(
    made: Sequence[Request], spec: ClusterSpec = SPEC, **options: object
) -> tuple[Simulation, list[Life]]:
    simulation = Simulation(spec, RouteOptions(**options), read_table(), BLOCK_SIZE, seed=1)  # type: ignore[arg-type]
    return simulation, simulation.run(made)


@pytest.mark.parametrize("rate", [0.5, 20.0])
@pytest.mark.parametrize("split", ["auto", "always", "never"])
def test_every_token_is_computed_cached_or_fetched_exactly_once(rate: float, split: str) -> None:
    made = requests(50, rate)
    simulation, lives = run(made, split=split)
    works = [worker.work for worker in simulation.workers.values()]
    assert sum(work.preemptions for work in works) == 0
    computed = sum(life.request.prompt_tokens - life.cached_tokens - life.fetched_tokens for life in lives)
    assert sum(work.prefill_tokens for work in works) == computed
    assert sum(work.decode_tokens for work in works) == sum(r.answer_tokens - 1 for r in made)
    assert sum(life.cached_tokens for life in lives) > 0
    assert all(life.first_token_s < life.end_s for life in lives)


def test_no_request_is_lost_where_there_is_hardly_room() -> None:
    made = requests(50, rate=20.0)
    simulation, lives = run(made, replace(SPEC, blocks=40))
    assert all(life.end_s > 0 for life in lives)
    assert sum(life.attempts for life in lives) > len(lives)  # some were refused at first
    assert all(worker.idle for worker in simulation.workers.values())


def test_a_prefix_that_another_worker_has_is_fetched() -> None:
    same = tuple(range(12))
    made = [Request(0.0, 12 * BLOCK_SIZE, 2, same)]
    made += [Request(10.0, 13 * BLOCK_SIZE, 2, (*same, 100 + n)) for n in range(6)]
    simulation, lives = run(made, split="always")
    fetched = [life for life in lives if life.fetched_tokens]
    assert fetched
    assert all(life.fetched_tokens + life.cached_tokens == 12 * BLOCK_SIZE for life in fetched)
    assert sum(worker.work.lent for worker in simulation.workers.values()) == len(fetched)


def test_a_seed_repeats_a_run_and_another_one_differs() -> None:
    made = requests(50, rate=4.0)

    def outcome(seed: int) -> list[float]:
        return simulate(made, BLOCK_SIZE, SPEC, RouteOptions(), read_table(), seed, warm_up=10).ttft_s

    assert outcome(1) == outcome(1)
    assert outcome(1) != outcome(2)


def test_two_gateways_share_the_work_of_one() -> None:
    made = requests(50, rate=4.0)
    _, lives = run(made, replace(SPEC, gateways=2))
    assert all(life.end_s > 0 for life in lives)
    assert sum(life.cached_tokens for life in lives) > 0


def test_events_happen_in_the_order_of_time_then_of_coming() -> None:
    timeline, happened = Timeline(), []
    for name, when_s in (("c", 2.0), ("a", 1.0), ("d", 2.0), ("b", 1.0)):
        timeline.at(when_s, happened.append, name)
    timeline.run(until=lambda: len(happened) == 4, limit_s=10.0)
    assert happened == ["a", "b", "c", "d"]
    assert timeline.now() == 2.0


def test_a_run_that_does_not_end_is_noticed() -> None:
    with pytest.raises(AssertionError, match="nothing is left"):
        Timeline().run(until=lambda: False, limit_s=1.0)
    timeline = Timeline()
    timeline.at(5.0, lambda: None)
    with pytest.raises(AssertionError, match="still not done"):
        timeline.run(until=lambda: False, limit_s=1.0)


def test_a_coroutine_that_waits_is_no_twin() -> None:
    async def answers() -> int:
        return 3

    assert immediate(answers()) == 3
