"""The fitted step model: right under noise, sane without samples, cautious where they do not tell."""

import random
import statistics

import pytest

from router.step_model import StepModel, StepWork, context_of
from services.engine.step_times import StepTimes

CPU = StepModel(step=10.0, token=1.0, token_context=1e-4, sequence=1.0, context=1e-3)
GPU = StepModel(step=8.0, token=0.05, token_context=2e-6, sequence=0.02, context=1e-5)
FLAT = StepModel(step=40.0, token=3.0, sequence=1.0)


def prefill(rng: random.Random) -> StepWork:
    tokens, start = rng.choice([16, 64, 256, 512]), rng.randrange(8_000)
    return StepWork(tokens, context_of(tokens, start))


def decode(rng: random.Random, sequences: int = 0) -> StepWork:
    sequences = sequences or rng.randrange(1, 33)
    return StepWork(0, 0, sequences, sequences * rng.randrange(200, 4_000))


def mixed(rng: random.Random) -> StepWork:
    prompt, decoding = prefill(rng), decode(rng)
    return StepWork(prompt.tokens, prompt.token_context, decoding.sequences, decoding.context)


def run(times: StepTimes, true: StepModel, rng: random.Random, kinds, steps: int, outliers=0.02) -> None:
    """Steps with 20 % noise, a share of which take ten times as long."""
    for _ in range(steps):
        work = rng.choice(kinds)(rng)
        stopped = 10 if rng.random() < outliers else 1
        times.add(true.step_ms(work) * rng.uniform(0.8, 1.2) * stopped, work)
        times.expected_ms(work)  # as an engine asks, so that it is fitted as often


def errors(times: StepTimes, true: StepModel, rng: random.Random, kinds) -> list[float]:
    """Relative errors of predictions, ascending."""
    works = [rng.choice(kinds)(rng) for _ in range(200)]
    return sorted(abs(times.expected_ms(work) / true.step_ms(work) - 1) for work in works)


@pytest.mark.parametrize("true", [CPU, GPU, FLAT])
@pytest.mark.parametrize(
    "kinds",
    [[prefill], [decode], [mixed], [prefill, decode, mixed], [decode] * 30 + [mixed]],
    ids=["prefill", "decode", "mixed", "all", "mostly decode"],
)
@pytest.mark.parametrize("seed", range(3))
def test_noise_and_outliers_do_not_mislead(true, kinds, seed):
    times, rng = StepTimes(), random.Random(seed)
    run(times, true, rng, kinds, 300)
    wrong = errors(times, true, rng, kinds)
    assert statistics.mean(wrong) < 0.05
    assert wrong[int(0.95 * len(wrong))] < 0.15


def test_without_noise_predictions_are_exact():
    times, rng = StepTimes(), random.Random(0)
    for _ in range(2_000):
        work = rng.choice([prefill, decode, mixed])(rng)
        times.add(CPU.step_ms(work), work)
        times.expected_ms(work)
    assert errors(times, CPU, rng, [prefill, decode, mixed])[-1] < 0.01


def test_nothing_is_expected_of_a_kind_of_step_that_was_never_measured():
    times = StepTimes()
    assert times.model is None
    assert times.expected_ms(StepWork(0, 0, 1, 100)) is None
    times.add(20.0, StepWork(0, 0, 1, 100))
    assert times.expected_ms(StepWork(0, 0, 1, 100)) == pytest.approx(20.0, rel=0.01)
    assert times.expected_ms(StepWork(8, context_of(8, 0))) is None
    assert (times.model.knows_prefill, times.model.knows_decode) == (False, True)
    times.add(20.0, StepWork(8, context_of(8, 0), 1, 100))
    assert times.expected_ms(StepWork(8, context_of(8, 0))) is not None
    assert times.model.knows_prefill


def test_a_kind_that_costs_nothing_is_still_known():
    times = StepTimes()
    for tokens in (1, 2, 4, 8, 16) * 4:
        times.add(5.0, StepWork(tokens, context_of(tokens, 0)))
    assert times.model.knows_prefill
    assert times.expected_ms(StepWork(4, context_of(4, 0))) == pytest.approx(5.0, rel=0.05)


def test_a_worker_that_saw_one_batch_size_does_not_extrapolate_wildly():
    """Between "a step is free" and "a sequence is free" it takes the middle."""
    times, rng = StepTimes(), random.Random(0)
    for _ in range(200):
        times.add(20.0 * rng.uniform(0.8, 1.2), StepWork(0, 0, 8, 8 * 500))
        assert times.model
    assert times.expected_ms(StepWork(0, 0, 8, 8 * 500)) == pytest.approx(20.0, rel=0.1)
    assert 24.0 < times.expected_ms(StepWork(0, 0, 32, 32 * 500)) < 75.0
    assert 4.0 < times.expected_ms(StepWork(0, 0, 1, 500)) < 18.0


def test_what_was_learned_once_survives_hours_of_other_steps():
    times, rng = StepTimes(), random.Random(0)
    run(times, CPU, rng, [prefill, mixed], 100)
    run(times, CPU, rng, [lambda rng: decode(rng, sequences=8)], 2_000)
    assert statistics.mean(errors(times, CPU, rng, [prefill])) < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_that_is_always_busy_knows_how_long_its_queue_takes(seed):
    """All its steps are full: what is a step's and what its tokens' time the samples cannot tell."""
    times, rng = StepTimes(), random.Random(seed)
    run(times, CPU, rng, [lambda rng: StepWork(128, context_of(128, rng.randrange(900)))], 2_000)
    queue = (1_280, context_of(1_280, 0))
    expected_ms = times.model.queue_ms(*queue, chunk_tokens=128)
    assert expected_ms == pytest.approx(CPU.queue_ms(*queue, chunk_tokens=128), rel=0.1)


def test_a_machine_that_becomes_slower_is_known_after_some_tens_of_steps():
    times, rng = StepTimes(), random.Random(0)
    run(times, CPU, rng, [prefill, decode], 200)
    slower = StepModel(step=20.0, token=2.0, token_context=2e-4, sequence=2.0, context=2e-3)
    run(times, slower, rng, [prefill, decode], 120)
    assert statistics.mean(errors(times, slower, rng, [prefill, decode])) < 0.1


def test_a_first_step_that_warms_up_is_soon_forgotten():
    times, rng = StepTimes(), random.Random(0)
    times.add(5_000.0, StepWork(20, context_of(20, 0)))
    run(times, CPU, rng, [prefill], 6, outliers=0)
    assert statistics.mean(errors(times, CPU, rng, [prefill])) < 0.2


def test_one_step_in_which_the_process_stood_still_changes_nothing():
    times, rng = StepTimes(), random.Random(0)
    run(times, CPU, rng, [decode], 64, outliers=0)
    before = times.expected_ms(StepWork(0, 0, 8, 4_000))
    times.add(5_000.0, StepWork(0, 0, 8, 4_000))
    run(times, CPU, rng, [decode], 16, outliers=0)
    assert times.expected_ms(StepWork(0, 0, 8, 4_000)) == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_no_coefficient_is_ever_negative_or_not_a_number(seed):
    times, rng = StepTimes(), random.Random(seed)
    for _ in range(200):
        work = rng.choice([prefill, decode, mixed])(rng)
        times.add(rng.choice([0.0, 1e-3, 1.0, 1e6]) * rng.random(), work)
        model = times.model
        values = (model.step, model.token, model.token_context, model.sequence, model.context)
        assert all(0 <= value < 1e9 for value in values)
