"""The cost model: no measure of load makes any part of a request cheaper."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.cost import CostModel
from router.state import RouteOptions, RouteRequest, WorkerView
from router.step_model import StepModel

PARTS = (CostModel.prefill, CostModel.decode, CostModel.alone)
MODEL = StepModel(step=10.0, token=2.0, token_context=0.01, sequence=1.0, context=0.001)
IDLE = WorkerView(id="w", prefills=True, decodes=True, model=MODEL)
LOADS = ("queued_prefill_tokens", "queued_prefill_context", "running", "running_context", "waiting")


def model(worker, cached=0, coming=0, **options) -> CostModel:
    request = RouteRequest(prompt_tokens=100, max_tokens=10)
    tokens, coming_tokens = {worker.id: cached}, {worker.id: coming}
    return CostModel.of(request, tokens, [worker], RouteOptions(**options), [], coming_tokens)


@pytest.mark.parametrize("part", PARTS)
@given(
    loads=st.fixed_dictionaries({name: st.integers(0, 10_000) for name in LOADS}),
    name=st.sampled_from(LOADS),
    more=st.integers(1, 10_000),
)
def test_more_load_never_lowers_a_cost(part, loads, name, more):
    light = replace(IDLE, **loads)
    heavy = replace(light, **{name: loads[name] + more})
    assert part(model(heavy), heavy).cost_ms >= part(model(light), light).cost_ms


@pytest.mark.parametrize("part", PARTS)
@given(cached=st.integers(0, 100), more=st.integers(0, 100))
def test_more_cached_tokens_never_raise_a_cost(part, cached, more):
    assert part(model(IDLE, cached + more), IDLE).cost_ms <= part(model(IDLE, cached), IDLE).cost_ms


@pytest.mark.parametrize("part", [CostModel.prefill, CostModel.alone])
@given(cached=st.integers(0, 100), coming=st.integers(0, 200))
def test_what_is_coming_counts_as_cached_for_who_computes(part, cached, coming):
    there = min(max(cached, coming), 100)
    assert part(model(IDLE, cached, coming), IDLE) == part(model(IDLE, there), IDLE)


@given(cached=st.integers(0, 100), coming=st.integers(0, 200))
def test_a_decode_worker_takes_its_blocks_before_anything_comes(cached, coming):
    assert CostModel.decode(model(IDLE, cached, coming), IDLE) == CostModel.decode(model(IDLE, cached), IDLE)


def test_without_anything_to_decode_prompts_take_steps_of_their_own():
    worker = replace(IDLE, queued_prefill_tokens=50, queued_prefill_context=600, chunk_tokens=16)
    offer = model(worker, cached=60).prefill(worker)
    assert offer.queue_ms == pytest.approx(50 / 16 * 10 + 50 * 2 + 600 * 0.01)
    assert offer.prefill_ms == pytest.approx(3 * 10 + 40 * 2 + sum(range(60, 100)) * 0.01)


def test_each_part_sums_the_documented_terms():
    load = {"queued_prefill_tokens": 50, "queued_prefill_context": 600, "running_context": 900}
    worker = replace(IDLE, running=3, waiting=2, **load)
    costs = model(
        worker,
        cached=60,
        transfer_ms=1.0,
        transfer_ms_per_token=0.5,
        behind=0.5,
        interference=2.0,
        arrival_ms=1_000.0,
        decode_step_ms_target=16.0,
        over_target=10.0,
    )
    beside = 10 + 3 * 1 + 900 * 0.001  # what a step decodes already
    room = 16 - beside
    queue_tokens, tokens = 50 * 2 + 600 * 0.01, 40 * 2 + sum(range(60, 100)) * 0.01
    queue = queue_tokens + queue_tokens / room * beside
    prefill = tokens + tokens / room * beside
    decode = 10 + (3 + 2 + 1) * 1 + (900 + 100) * 0.001
    late = 10 * (decode - 16)
    assert costs.prefill(worker).cost_ms == pytest.approx(queue + prefill + 0.5 * 2 * prefill)
    others = (3 + 2) * decode
    assert costs.decode(worker).cost_ms == pytest.approx(
        (1 + 40 * 0.5) + decode + late + 2 * (queue / 2 + others)
    )
    delayed = 2 * ((3 + prefill / 2_000) * prefill + others)
    assert costs.alone(worker).cost_ms == pytest.approx(queue + prefill + decode + late + delayed)
