"""The pure parts of the gateway's benchmark."""

import random

import pytest

from tests.bench.gateway.client import Answer, answer_tokens
from tests.bench.gateway.figures import Figures, mean_parts
from tests.bench.gateway.load import Call, ClientReport, Load, Served, Window
from tests.bench.gateway.stand import Taken

WINDOW = Window(begins_at=0.0, measured_from=10.0, ends_at=20.0)


def taken(*calls: Call, served: dict[str, Served]) -> Taken:
    load = Load(name="stream", concurrency=1, answer_tokens=4)
    return Taken(load, WINDOW, ClientReport([*calls], 0.1), served, 1.0, 0.5, 0, 0)


def call(sent_at: float, *seen: tuple[float, int], **more) -> Call:
    return Call(
        sent_at=sent_at,
        request_id="r",
        seen_at=[at for at, _ in seen],
        tokens=[tokens for _, tokens in seen],
        events=len(seen),
        **more,
    )


def test_what_the_workers_took_is_not_added_by_the_gateway():
    served = Served(run_at=11.002, replied_at=11.012, emitted_at=[11.040, 11.065])
    seen = call(11.0, (11.015, 1), (11.042, 2), (11.066, 3), ended_at=11.067)
    figures = Figures.of(taken(seen, served={"r": served}))
    assert figures.first.ms == pytest.approx([5.0])
    assert figures.token.ms == pytest.approx([1.0, 2.0])
    assert (figures.requests, figures.tokens) == (1, 3)
    assert figures.us_per_token == pytest.approx(1e6 / 3)


def test_tokens_of_one_event_waited_each_from_its_own_step():
    served = Served(run_at=11.0, replied_at=11.0, emitted_at=[11.1, 11.2])
    figures = Figures.of(taken(call(11.0, (11.0, 1), (11.3, 3)), served={"r": served}))
    assert figures.token.ms == pytest.approx([100.0, 200.0])
    assert figures.tokens_per_event == 1.5


def test_only_the_window_is_measured():
    served = Served(run_at=9.0, replied_at=9.0, emitted_at=[9.5, 10.5, 20.5])
    seen = call(9.0, (9.1, 1), (9.6, 2), (10.6, 3), (20.6, 4), ended_at=20.7)
    figures = Figures.of(taken(seen, served={"r": served}))
    assert (figures.requests, figures.tokens, figures.first.ms) == (0, 1, [])
    assert figures.token.ms == pytest.approx([100.0])


def test_the_parts_of_the_first_tokens_time_sum_up_to_it():
    served = Served(run_at=11.006, replied_at=11.016)
    seen = call(11.0, (11.017, 1), timings={"tokenize": 2.0, "route": 1.0})
    parts = mean_parts(taken(seen, served={"r": served}))
    assert parts == pytest.approx((2.0, 1.0, 3.0, 1.0))
    assert sum(parts) == pytest.approx(*Figures.of(taken(seen, served={"r": served})).first.ms)


def test_an_answers_tokens_are_counted_by_its_characters_however_it_is_cut():
    events = [
        b'data: {"id":"chatcmpl-r","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n',
        'data: {"id":"chatcmpl-r","choices":[{"delta":{"content":"aé"}}]}\n\n'.encode(),
        b'data: {"id":"chatcmpl-r","choices":[{"delta":{"content":"bc"}}]}\n\ndata: [DONE]\n\n',
    ]
    stream, rng = b"".join(events), random.Random(1)
    for _ in range(50):
        answer = Answer(Call(sent_at=0.0), answer_characters=[1, 2, 4], streamed=True)
        cuts = sorted(rng.sample(range(1, len(stream)), 4))
        for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(stream)], strict=True)):
            answer.feed(stream[begin:end], float(number))
        assert answer.call.request_id == "r"
        assert answer.call.tokens[-1] == 3
        assert answer.call.events == 3
        assert answer.call.tokens == sorted(set(answer.call.tokens))


def test_answers_are_from_half_to_half_more_of_their_mean():
    rng = random.Random(1)
    lengths = [answer_tokens(8, rng) for _ in range(500)]
    assert {min(lengths), max(lengths)} == {4, 12}
    assert {answer_tokens(1, rng) for _ in range(50)} == {1}
