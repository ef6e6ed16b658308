"""What a request's journal says: usage, timings and metrics, from its events on a manual clock."""

import asyncio
from contextlib import nullcontext

import pytest

from router.state import Offer, Route, WorkerView
from services.core.clock import ManualClock
from services.core.errors import Overloaded, WorkerLost
from services.gateway.metrics import GatewayMetrics
from services.gateway.path.generation import AttemptFailed, Routed
from services.gateway.path.record import Record
from services.gateway.workers.worker_client import OutputToken, PrefillResult, Started
from tests.unit.gateway.scripted_worker_server import report

P, D = report("p1", "prefill"), report("d1", "decode")


def routed(prefill=P, decode=D) -> Routed:
    offer = Offer(worker=WorkerView(id="x", prefills=True, decodes=True), part="alone", cached_tokens=0)
    return Routed(Route((offer,), (offer,)), prefill, decode)


class Told:
    """A journal, with time passing between its events."""

    def __init__(self) -> None:
        self.clock = ManualClock(100.0)
        self.metrics = GatewayMetrics()
        self.record = Record("completions", self.clock, self.metrics, 99.5)
        [self.journal] = self.record.of_prompts(1)

    def tell(self, *events) -> "Told":
        for event in events:
            if isinstance(event, float):
                self.clock.advance(event)
            else:
                self.journal.record(event)
        return self

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics._registry.get_sample_value(f"diptych_gateway_{name}", labels)


@pytest.fixture
def told() -> Told:
    told = Told()
    told.journal.admit(prompt_tokens=10, seed=5)
    return told


def test_timings_of_a_split_request(told) -> None:
    first = PrefillResult((OutputToken(0, 5),), cached_tokens=4, queue_ms=7.0, compute_ms=80.0)
    told.tell(0.25, routed(), 0.1, first, OutputToken(0, 5))
    told.tell(
        0.05, Started(6, 0.0, 1000, 40.0, 5.0), 0.2, OutputToken(1, 6), 0.2, OutputToken(2, 7, "length")
    )
    timings = told.journal.timings
    assert (timings.tokenize, timings.route) == (500.0, 250.0)
    assert (timings.queue, timings.prefill) == (7.0, 80.0)
    assert (timings.transfer, timings.exposed_transfer) == (40.0, 5.0)
    assert (timings.first_token, timings.decode, timings.total) == (850.0, 450.0, 1300.0)
    assert timings.tokens_per_second == round(2 / 0.45, 2)
    assert (timings.prefill_worker, timings.decode_worker) == ("p1", "d1")
    assert (timings.cached_tokens_prefill, timings.cached_tokens_decode, timings.attempts) == (4, 6, 1)


def test_usage_counts_all_tokens_and_the_prefill_s_cache(told) -> None:
    first = PrefillResult((OutputToken(0, 5),), cached_tokens=4, queue_ms=0.0, compute_ms=0.0)
    told.tell(routed(), first, OutputToken(0, 5), Started(6, 0.0, 0, 0.0, 0.0), OutputToken(1, 5, "length"))
    usage = told.journal.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (10, 2, 12)
    assert usage.prompt_tokens_details.cached_tokens == 4


def test_a_decode_worker_alone_says_what_was_cached_and_its_prefill_is_timed_here(told) -> None:
    told.tell(
        routed(prefill=None), Started(8, 0.0, 0, 0.0, 0.0), 0.3, OutputToken(0, 5), OutputToken(1, 6, "stop")
    )
    assert told.journal.usage.prompt_tokens_details.cached_tokens == 8
    assert told.journal.timings.prefill == 300.0
    assert told.journal.timings.prefill_worker is None


def test_a_resume_does_not_change_what_was_cached_of_the_prompt(told) -> None:
    first = PrefillResult((OutputToken(0, 5),), cached_tokens=4, queue_ms=0.0, compute_ms=0.0)
    again = PrefillResult((OutputToken(1, 6, "stop"),), cached_tokens=11, queue_ms=0.0, compute_ms=0.0)
    told.tell(routed(), first, OutputToken(0, 5), AttemptFailed(WorkerLost("gone"), D))
    told.tell(routed(), again, OutputToken(1, 6, "stop"))
    assert told.journal.usage.prompt_tokens_details.cached_tokens == 4
    assert told.journal.usage.completion_tokens == 2
    assert told.journal.timings.attempts == 2
    assert told.metric("retries_total", error="worker_lost") == 1
    assert told.metric("cached_tokens_total") == 4


def test_choices_are_counted_together_and_timed_apart(told) -> None:
    firsts = (OutputToken(0, 5, None, 0), OutputToken(0, 6, None, 1))
    told.tell(routed(), PrefillResult(firsts, 4, 0.0, 0.0), *firsts, Started(0, 0.0, 100, 1.0, 1.0))
    told.tell(0.25, OutputToken(1, 5, None, 0), 0.25, OutputToken(1, 6, "stop", 1))
    told.tell(0.25, OutputToken(2, 5, "length", 0))
    usage, timings = told.journal.usage, told.journal.timings
    assert (usage.prompt_tokens, usage.completion_tokens) == (10, 5)
    assert (timings.decode, timings.tokens_per_second) == (750.0, 4.0)
    assert told.metric("inter_token_seconds_sum") == 0.25 + 0.5 + 0.5
    assert told.metric("inter_token_seconds_count") == 3
    assert told.metric("prompt_tokens_total") == 10


def test_choices_that_go_on_apart_keep_the_request_s_stages_legal(told) -> None:
    lost = WorkerLost("gone")
    first = (OutputToken(0, 5, None, 0), OutputToken(0, 6, None, 1))
    with told.record.keeping():
        told.tell(routed(), PrefillResult(first, 0, 0.0, 0.0), *first, AttemptFailed(lost, D))
        told.tell(routed(prefill=None), AttemptFailed(lost, D, others_go_on=True), routed())
        told.tell(Started(0, 0.0, 0, 0.0, 0.0), OutputToken(1, 5, "length", 0), routed(prefill=None))
        told.tell(AttemptFailed(lost, D, others_go_on=True), routed(), OutputToken(1, 5, "stop", 1))
    assert told.metric("requests_total", endpoint="completions", outcome="ok") == 1
    assert told.metric("retries_total", error="worker_lost") == 3
    assert told.journal.usage.completion_tokens == 4


def test_stages_are_observed_when_they_are_left(told) -> None:
    first = PrefillResult((OutputToken(0, 5),), cached_tokens=0, queue_ms=0.0, compute_ms=0.0)
    with told.record.keeping():
        told.tell(0.5, routed(), 1.0, first, OutputToken(0, 5), 0.25, Started(0, 0.0, 0, 0.0, 0.0), 2.0)
        told.tell(OutputToken(1, 5, "length"))
    seconds = {
        stage: told.metric("stage_seconds_sum", stage=stage)
        for stage in ("received", "admitted", "prefilling", "transferring", "decoding")
    }
    assert seconds == {
        "received": 0.5,
        "admitted": 0.5,
        "prefilling": 1.0,
        "transferring": 0.25,
        "decoding": 2.0,
    }
    assert told.metric("time_to_first_token_seconds_sum") == 2.0
    assert told.metric("inter_token_seconds_sum") == 2.25


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (Overloaded("full"), "overloaded"),
        (asyncio.CancelledError(), "cancelled"),
        (ZeroDivisionError(), "internal"),
    ],
)
def test_every_request_ends_with_exactly_one_outcome(told, error, outcome) -> None:
    finished = PrefillResult((OutputToken(0, 5, "stop"),), 0, 0.0, 0.0)
    expected = pytest.raises(type(error)) if error is not None else nullcontext()
    with expected, told.record.keeping():
        told.tell(routed(), finished, OutputToken(0, 5, "stop"))
        if error is not None:
            raise error
    assert told.metric("requests_total", endpoint="completions", outcome=outcome) == 1
    counted = [
        sample.value
        for family in told.metrics._registry.collect()
        for sample in family.samples
        if sample.name == "diptych_gateway_requests_total"
    ]
    assert counted == [1.0]
