"""Traces keep what they know of prefixes, lengths and times, whatever they are cut and stretched to."""

import json
import random
from pathlib import Path
from statistics import fmean

import pytest

from tests.bench.routing.traces import Request, Trace, azure, mooncake, private_request, spread, uniform


def write_mooncake(folder: Path, rows: list[tuple[int, int, int, list[int]]]) -> None:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (folder / "mooncake_conversation.jsonl").write_text("\n".join(lines) + "\n")


def test_equal_ids_of_the_trace_are_equal_leading_blocks_and_nothing_more(tmp_path: Path) -> None:
    write_mooncake(tmp_path, [(0, 1200, 32, [1, 2, 3]), (0, 1500, 32, [1, 2, 9]), (0, 600, 32, [4, 2])])
    trace = mooncake(tmp_path, random.Random(0))
    by_id = {request.content: request.prompt_ids(trace.block_size) for request in trace.requests}
    first, second, third = by_id[1, 2, 3], by_id[1, 2, 9], by_id[4, 2]
    shared = 2 * trace.block_size
    assert first[:shared] == second[:shared]
    assert first[shared : shared + 1] != second[shared : shared + 1]
    assert first[: trace.block_size] != third[: trace.block_size]
    assert [len(first), len(second), len(third)] == [1200 // 16, 1500 // 16, 600 // 16]


def test_times_are_spread_within_their_tick_and_stay_ordered() -> None:
    requests = [Request(3.0 * (n // 10), 10, 2, (n,)) for n in range(100)]
    moved = spread(requests, 3.0, random.Random(0))
    times = [request.at_s for request in moved]
    assert times == sorted(times)
    assert all(request.at_s // 3.0 == request.content[0] // 10 for request in moved)
    assert len(set(times)) == 100


def test_a_window_has_the_rate_that_was_asked_for_and_keeps_the_order() -> None:
    trace = uniform(random.Random(0))
    window = trace.window(500, 4.0, random.Random(3))
    assert len(window) == 500
    assert window[0].at_s == 0.0
    assert window[-1].at_s == pytest.approx(499 / 4.0)
    place = trace.requests.index(next(r for r in trace.requests if r.content == window[0].content))
    assert [r.content for r in window] == [r.content for r in trace.requests[place : place + 500]]


def test_a_window_beyond_the_trace_is_the_trace() -> None:
    trace = Trace("small", 16, tuple(private_request(n, float(n), 10, 2, 16) for n in range(5)))
    assert len(trace.window(100, 1.0, random.Random(0))) == 5


def test_requests_that_share_nothing_differ_from_their_first_token_on() -> None:
    requests = uniform(random.Random(0)).requests[:200]
    assert len({request.prompt_ids(32)[0] for request in requests}) == 200
    assert 400 < fmean(request.prompt_tokens for request in requests) < 700


def test_azure_requests_have_the_recorded_lengths_and_times(tmp_path: Path) -> None:
    rows = ["2023-11-16 18:15:47.5,800,40", "2023-11-16 18:15:46.0,30,3", "2023-11-16 18:15:50.0,100000,9"]
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n"
    (tmp_path / "azure_2023_conv.csv").write_text(text)
    requests = azure(tmp_path, "conv", divide=2).requests
    assert [(r.prompt_tokens, r.answer_tokens) for r in requests] == [
        (15, 2),
        (400, 20),
    ]  # the third is too long
    assert requests[1].at_s - requests[0].at_s == pytest.approx(1.5)


def test_a_missing_trace_is_a_line_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data"):
        mooncake(tmp_path, random.Random(0))
