"""The step model: closed forms against sums written out, and what a worker that has not measured takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.step_model import StepModel, StepWork, average, context_of

MODEL = StepModel(step=10.0, token=1.0, token_context=0.01, sequence=2.0, context=0.001)
coefficients = st.floats(0, 10)
models = st.builds(
    StepModel,
    step=coefficients,
    token=st.floats(0.001, 10),
    token_context=st.floats(0, 0.1),
    sequence=coefficients,
    context=coefficients,
)


@given(st.integers(0, 300), st.integers(0, 10_000))
def test_the_context_of_a_prefill_sums_the_tokens_before_each_of_its_tokens(tokens, start):
    assert context_of(tokens, start) == sum(range(start, start + tokens))


def test_a_step_takes_the_sum_of_what_it_computes():
    assert MODEL.step_ms(StepWork()) == 10.0
    assert MODEL.step_ms(StepWork(100, 5_000, 3, 900)) == pytest.approx(10 + 100 + 50 + 6 + 0.9)
    assert MODEL.prefill_ms(3, start=7) == MODEL.step_ms(StepWork(3, 7 + 8 + 9))
    assert MODEL.prefill_ms(100, 0, chunk_tokens=40) == pytest.approx(3 * 10 + 100 + 49.5)
    assert MODEL.queue_ms(100, 5_000, chunk_tokens=40) == pytest.approx(2.5 * 10 + 100 + 50)
    assert (MODEL.queue_ms(100, 5_000, 0), MODEL.queue_ms(0, 0, 0)) == (pytest.approx(160.0), 0.0)
    assert MODEL.decode_ms(3, 900) == MODEL.step_ms(StepWork(0, 0, 3, 900))


@given(models, st.floats(0, 1_000), st.integers(0, 10_000))
def test_the_tokens_that_fit_into_a_time_are_the_most_that_do(model, ms, start):
    tokens = model.tokens_within(ms, start)
    assert model.tokens_ms(tokens, context_of(tokens, start)) <= ms + 1e-6
    assert model.tokens_ms(tokens + 2, context_of(tokens + 2, start)) > ms


def test_what_a_worker_has_not_measured_it_takes_from_the_others():
    prefilling, decoding = StepModel(step=8.0, token=3.0), StepModel(step=4.0, sequence=2.0, context=0.5)
    typical = average([prefilling, decoding, StepModel(step=9.0, token=1.0)], assumed=MODEL)
    assert typical == StepModel(step=7.0, token=2.0, sequence=2.0, context=0.5)
    assert prefilling.completed(typical) == StepModel(step=8.0, token=3.0, sequence=2.0, context=0.5)
    assert decoding.completed(typical) == StepModel(step=4.0, token=2.0, sequence=2.0, context=0.5)


def test_what_nobody_has_measured_is_assumed():
    assert average([], assumed=MODEL) == MODEL
    only_decoding = average([StepModel(step=4.0, sequence=2.0)], assumed=MODEL)
    assert only_decoding == StepModel(step=4.0, token=1.0, token_context=0.01, sequence=2.0)
