"""The cost model: no measure of load makes any part of a request cheaper."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.cost import CostModel
from router.state import RouteOptions, RouteRequest, WorkerView

PARTS = (CostModel.prefill, CostModel.decode, CostModel.alone)
IDLE = WorkerView(id="w", prefills=True, decodes=True, prefill_ms_per_token=2.0, decode_step_ms=10.0)


def model(worker, cached=0, **options) -> CostModel:
    request = RouteRequest(prompt_tokens=100, max_tokens=10)
    return CostModel.of(request, {worker.id: cached}, [worker], RouteOptions(**options))


@pytest.mark.parametrize("part", PARTS)
@given(
    loads=st.fixed_dictionaries(
        {name: st.integers(0, 10_000) for name in ("queued_prefill_tokens", "running", "waiting")}
    ),
    name=st.sampled_from(["queued_prefill_tokens", "running", "waiting"]),
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


def test_each_part_sums_the_documented_terms():
    worker = replace(IDLE, queued_prefill_tokens=50, running=3, waiting=2)
    costs = model(worker, cached=60, transfer_ms=1.0, transfer_ms_per_token=0.5, step_growth=0.1)
    assert costs.prefill(worker).cost_ms == pytest.approx(50 * 2 + 40 * 2)
    assert costs.decode(worker).cost_ms == pytest.approx((1 + 40 * 0.5) + 10 * (1 + 2 + 0.3) + 50 * 2 / 2)
    assert costs.alone(worker).cost_ms == pytest.approx(50 * 2 + 40 * 2 + 10 * (1 + 2 + 0.3) + 3 * 40 * 2)
