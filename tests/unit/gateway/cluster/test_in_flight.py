"""Our own work beside the reports: each part counts once, however late or long silent the reports are."""

import random
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.route import route as route_of
from router.state import Offer, Part, Route, RouteOptions, RouteRequest, WorkerView
from router.step_model import StepModel, context_of
from services.core.block_hash import Compatibility
from services.core.clock import ManualClock
from services.core.worker_report import WorkerReport, sequence_tag
from services.gateway.cluster.in_flight import UNNAMED_S, InFlight

VIEW = WorkerView(id="d1", prefills=True, decodes=True, blocks_available=10, block_size=16)


def route(part: Part, cached: int = 0) -> Route:
    offer = Offer(worker=VIEW, part=part, cached_tokens=cached)
    return Route((offer,), (offer,))


def report(*newest: str) -> WorkerReport:
    return WorkerReport(
        worker_id="d1",
        epoch=1,
        role="both",
        state="ready",
        address="",
        served_model="m",
        compatibility=Compatibility(model="m", revision="r", layout="l"),
        context_tokens_max=1000,
        newest=[sequence_tag(seq_id) for seq_id in newest],
    )


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def in_flight(clock) -> InFlight:
    return InFlight(clock)


@pytest.mark.parametrize(
    ("part", "queued", "running"), [("prefill", 30, 0), ("decode", 0, 1), ("alone", 30, 1)]
)
def test_sent_work_is_added_until_it_ends(in_flight, part, queued, running) -> None:
    with in_flight.sent(route(part, cached=10), "r-1", 40, 1):
        view = in_flight.applied_to(VIEW, age_s=0.0)
        assert (view.queued_prefill_tokens, view.running, view.blocks_available) == (queued, running, 6)
        assert view.queued_prefill_context == (context_of(30, 10) if queued else 0)
        assert view.running_context == 40 * running
    assert in_flight.applied_to(VIEW, age_s=0.0) == VIEW
    assert in_flight.parts == []


@pytest.mark.parametrize(
    ("part", "running", "blocks"), [("prefill", 0, 6), ("decode", 3, 4), ("alone", 3, 4)]
)
def test_choices_share_their_prompt_s_blocks_where_they_are_decoded(in_flight, part, running, blocks) -> None:
    with in_flight.sent(route(part), "r-1", 40, 3):
        view = in_flight.applied_to(VIEW, age_s=0.0)
        assert (view.running, view.running_context, view.blocks_available) == (running, 40 * running, blocks)


def test_work_counts_until_a_report_names_it_and_no_longer(in_flight) -> None:
    with in_flight.sent(route("alone"), "r-1", 40, 1):
        in_flight.heard(report("of another gateway"))
        assert in_flight.applied_to(VIEW, age_s=0.0).queued_prefill_tokens == 40
        in_flight.heard(report("r-1"))
        assert in_flight.applied_to(VIEW, age_s=0.0) == VIEW
        in_flight.heard(report("many that came later"))
        assert in_flight.applied_to(VIEW, age_s=0.0) == VIEW


def test_work_that_no_report_names_is_taken_to_be_reported_after_a_while(in_flight, clock) -> None:
    with in_flight.sent(route("alone"), "r-1", 40, 1):
        clock.advance(UNNAMED_S + 0.1)
        assert in_flight.applied_to(VIEW, age_s=0.0).running == 1  # no report has come
        in_flight.heard(report())
        assert in_flight.applied_to(VIEW, age_s=0.0) == VIEW


def test_a_prompt_with_its_first_token_is_queued_no_longer(in_flight) -> None:
    with in_flight.sent(route("prefill"), "r-1", 40, 1) as computing:
        computing.prefilled()
        assert in_flight.applied_to(VIEW, age_s=0.0) == VIEW
    with in_flight.sent(route("alone"), "r-2", 40, 1) as computing:
        computing.prefilled()
        view = in_flight.applied_to(VIEW, age_s=0.0)
        assert (view.queued_prefill_tokens, view.queued_prefill_context, view.running) == (0, 0, 1)


def test_reported_work_that_ends_is_taken_off_the_report_until_the_next_one(in_flight) -> None:
    busy = replace(VIEW, running=3, running_context=500, blocks_available=2)
    with in_flight.sent(route("decode"), "r-1", 40, 1):
        in_flight.heard(report("r-1"))
    view = in_flight.applied_to(busy, age_s=0.0)
    assert (view.running, view.running_context, view.blocks_available) == (2, 460, 6)
    in_flight.heard(report())
    assert in_flight.applied_to(busy, age_s=0.0) == busy


def test_without_reports_our_own_sequences_are_what_counts(in_flight) -> None:
    """Redis is away: a worker is as busy as we make it, from the last report on."""
    last = replace(VIEW, running=2, running_context=80, blocks_available=4)
    with in_flight.sent(route("decode"), "r-1", 40, 1), in_flight.sent(route("decode"), "r-2", 40, 1):
        in_flight.heard(report("r-1", "r-2"))
    for number in range(50):
        with in_flight.sent(route("decode"), f"later-{number}", 40, 1):
            assert in_flight.applied_to(last, age_s=60.0).running == 1
    assert in_flight.applied_to(last, age_s=60.0).running == 0


def test_without_any_load_of_a_report_all_our_parts_count_reported_or_not(in_flight) -> None:
    with in_flight.sent(route("alone"), "r-1", 40, 1), in_flight.sent(route("decode"), "r-2", 40, 1):
        in_flight.heard(report("r-1"))
        view = in_flight.alone_on(VIEW)
        assert (view.queued_prefill_tokens, view.running, view.blocks_available) == (40, 2, 2)
    assert in_flight.alone_on(VIEW) == VIEW


@pytest.mark.parametrize("ended", [False, True])
def test_nothing_is_kept_of_a_worker_that_has_left(in_flight, ended) -> None:
    with ExitStack() as running:
        running.enter_context(in_flight.sent(route("decode"), "r-1", 40, 1))
        in_flight.heard(report("r-1"))
        if ended:
            running.close()
        in_flight.lost("d1")
    assert in_flight._workers == {}


def test_a_queue_of_prompts_is_worked_off_while_a_report_ages() -> None:
    busy = replace(
        VIEW,
        queued_prefill_tokens=600,
        queued_prefill_context=40_000,
        model=StepModel(token=1, token_context=0.01),
    )  # a second
    in_flight = InFlight(ManualClock())
    view = in_flight.applied_to(busy, age_s=0.25)
    assert (view.queued_prefill_tokens, view.queued_prefill_context) == (450, 30_000)
    assert in_flight.applied_to(busy, age_s=2.0).queued_prefill_tokens == 0
    unknown = replace(busy, model=None)
    assert in_flight.applied_to(unknown, age_s=2.0) == unknown
    decoding = replace(busy, running=1, running_context=10)
    assert in_flight.applied_to(decoding, age_s=2.0) == decoding


def test_a_burst_adds_up_and_never_below_zero_blocks(in_flight) -> None:
    with in_flight.sent(route("alone"), "r-1", 100, 1), in_flight.sent(route("alone"), "r-2", 100, 1):
        view = in_flight.applied_to(VIEW, age_s=0.0)
        assert (view.queued_prefill_tokens, view.running, view.blocks_available) == (200, 2, 0)


@pytest.fixture
def running():
    """Requests that have been sent and not ended."""
    with ExitStack() as stack:
        yield stack


def routed(running: ExitStack, in_flight: InFlight, views, cached, seq_id: str) -> Route:
    """Where one of many equal requests goes; its work counts from then on."""
    request = RouteRequest(prompt_tokens=500, max_tokens=10)
    now = [in_flight.applied_to(view, age_s=0.0) for view in views]
    chosen = route_of(request, cached, now, RouteOptions(split="always"), random.Random(seq_id))
    running.enter_context(in_flight.sent(chosen, seq_id, 500, 1))
    return chosen


MODEL = StepModel(step=5.0, token=1.0, sequence=2.0)
PREFILLS = [
    WorkerView(id=f"p{n}", prefills=True, decodes=False, blocks_available=9_000, model=MODEL)
    for n in range(4)
]
DECODES = [
    WorkerView(id=f"d{n}", prefills=False, decodes=True, blocks_available=9_000, model=MODEL)
    for n in range(4)
]


def test_a_burst_of_equal_requests_spreads(in_flight, running) -> None:
    routes = [routed(running, in_flight, PREFILLS + DECODES, {}, f"r-{n}") for n in range(40)]
    for count in (Counter(r.prefill for r in routes), Counter(r.decode for r in routes)):
        assert set(count.values()) <= {9, 10, 11}
        assert len(count) == 4


def test_a_hot_prefix_is_copied_by_being_fetched(in_flight, running) -> None:
    """Nobody computes it a second time: whoever lacks it and has less to do fetches it."""
    cached = {"p0": 400}
    for number in range(40):
        computes = routed(running, in_flight, PREFILLS + DECODES, cached, f"r-{number}").computes
        assert computes.ready_tokens >= 400
        cached[computes.worker.id] = 400
    assert sorted(cached) == ["p0", "p1", "p2", "p3"]


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["send", "report", "end"]), max_size=40))
def test_each_sequence_counts_once_whenever_reports_come(moves) -> None:
    """The truth: `running` sequences. A report that has just come shows those that were sent by then."""
    in_flight, running, shown, sent = InFlight(ManualClock()), [], 0, 0
    for move in moves:
        if move == "send":
            sent += 1
            part = in_flight.sent(route("decode"), f"r-{sent}", 40, 1)
            part.__enter__()
            running.append((part, f"r-{sent}"))
        elif move == "end" and running:
            running.pop(0)[0].__exit__(None, None, None)
        elif move == "report":
            shown = len(running)
            in_flight.heard(report(*[seq_id for _, seq_id in running]))
        view = in_flight.applied_to(replace(VIEW, running=shown), age_s=0.0)
        assert view.running == len(running)
