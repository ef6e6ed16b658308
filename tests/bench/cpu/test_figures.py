"""From bytes of a stream to figures."""

import random

import pytest

from tests.bench.cpu.client import UNFINISHED, Exchange, Reader, Taken, Target
from tests.bench.cpu.figures import Figures, medians
from tests.bench.cpu.load import LONG, SHORT, Shape, cell

STREAM = (
    b'data: {"choices":[{"text":"a"}]}\n\n'
    b'data: {"choices":[{"text":""}]}\n\n'
    b'data: {"choices":[{"text":"bc"}],"usage":null}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":2,"completion_tokens":3}}\n\ndata: [DONE]\n\n'
)


def read(stream: bytes, cuts: list[int], status: int = 200) -> Exchange:
    exchange = Exchange(sent_at=0.0)
    reader = Reader(exchange, prompt_tokens=2, answer_tokens=3)
    for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(stream)], strict=True), 1):
        reader.feed(stream[begin:end], float(number))
    reader.end(status, float(len(cuts) + 2))
    return exchange


def test_tokens_are_those_the_server_counts_however_the_stream_is_cut():
    rng = random.Random(1)
    for _ in range(50):
        exchange = read(STREAM, sorted(rng.sample(range(1, len(STREAM)), 3)))
        assert (exchange.problem, exchange.tokens, len(exchange.arrivals)) == ("", 3, 2)


@pytest.mark.parametrize(
    ("stream", "status", "told"),
    [
        (STREAM.replace(b'"completion_tokens":3', b'"completion_tokens":2'), 200, "instead of"),
        (STREAM.replace(b"data: [DONE]\n\n", b""), 200, "ended early"),
        (STREAM.replace(b'"choices":[],', b'"error":{"message":"gone"},'), 200, "gone"),
        (b'{"error":"too long"}', 400, "HTTP 400"),
        (b"", 200, "ended early"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure(stream, status, told):
    assert told in read(stream, [], status).problem


def test_requests_ask_for_the_same_of_every_server():
    body = Target(1, "m", {"cache": False}).request([7, 8], 5).partition(b"\r\n\r\n")[2]
    for field in (b'"prompt":[7,8]', b'"max_tokens":5', b'"ignore_eos":true', b'"cache":false'):
        assert field in body


def exchange(sent_at: float, *arrivals: float, tokens: int) -> Exchange:
    return Exchange(sent_at, "", tokens, list(arrivals), arrivals[-1])


def test_figures_are_of_whole_answers_and_failures_are_counted():
    whole = exchange(1.0, 1.1, 1.2, 1.4, tokens=4)
    figures = Figures.of(Taken([whole, Exchange(1.0)], seconds=2.0), memory_mib=7.0)
    assert figures.tokens_per_s == 2.0
    assert figures.ttft_ms == pytest.approx(100)
    assert figures.tpot_ms == pytest.approx(100)
    assert figures.itl_p99_ms == pytest.approx(200)
    assert figures.tokens_per_event == pytest.approx(4 / 3)
    assert (figures.requests, figures.failed, figures.problems) == (2, 1, {UNFINISHED: 1})


def test_nothing_answered_has_no_latency():
    figures = Figures.of(Taken([Exchange(0.0)], seconds=1.0))
    assert (figures.tokens_per_s, figures.ttft_ms, figures.itl_p99_ms) == (0.0, None, None)


def test_medians_are_of_each_figure_and_failures_of_all_repetitions():
    three = [
        Figures(tokens_per_s=rate, ttft_ms=ttft, requests=4, failed=failed, memory_mib=memory)
        for rate, ttft, failed, memory in ((3.0, 9.0, 0, 5.0), (1.0, None, 4, 6.0), (2.0, 5.0, 0, 4.0))
    ]
    middle = medians(three)
    assert (middle.tokens_per_s, middle.ttft_ms, middle.memory_mib) == (2.0, 7.0, 6.0)
    assert (middle.requests, middle.failed, middle.tpot_ms) == (12, 4, None)


def test_prompts_are_the_same_for_all_contestants_and_others_in_each_repetition():
    load = cell(SHORT, 8, quick=False)
    assert load.prompts("1") == load.prompts("1")
    seen = {tuple(prompt) for repetition in "012" for prompt in load.prompts(repetition)}
    assert len(seen) == 3 * load.requests == 48
    assert {len(prompt) for prompt in seen} == {256}


def test_shapes_are_read_from_their_names():
    assert Shape.of("1024x128") == LONG
    assert str(LONG) == "1024x128"
    with pytest.raises(ValueError, match="PROMPTxANSWER"):
        Shape.of("0x8")
