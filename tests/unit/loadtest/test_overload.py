"""What the overload benchmark counts, and how it judges."""

import random

import httpx
import pytest

from loadtest.call import Outcome
from loadtest.workload import Call
from tests.bench.overload import FACTORS, KEYS, TARGET_S, Load, is_good, loads, new_call, row, verdict

GOOD = Outcome("completion, streamed", "completed", status=200, tokens=9, first_token_s=TARGET_S - 0.5)
LATE = Outcome("completion, streamed", "completed", status=200, tokens=9, first_token_s=TARGET_S + 0.5)
REFUSED = Outcome("completion, streamed", "failed", "HTTP 429: later", status=429, retry_after_s=4)
BROKEN = Outcome("completion, streamed", "failed", "HTTP 503: gone", status=503)
CUT = Outcome("completion, streamed", "failed", "in the stream: gone", status=200, first_token_s=0.1)


def call(key: str) -> Call:
    return Call("/v1/completions", {"priority": 0}, headers={"Authorization": f"Bearer {key}"})


def load(factor: float, *outcomes: Outcome) -> Load:
    keys = ["flood", "key 1"] * len(outcomes)
    return Load(factor, 2.0, [call(key) for key, _ in zip(keys, outcomes, strict=False)], outcomes)


def test_only_a_whole_answer_that_began_in_time_is_good() -> None:
    assert [is_good(outcome) for outcome in (GOOD, LATE, REFUSED, BROKEN, CUT)] == [True, *[False] * 4]


def test_goodput_is_counted_in_all_and_by_key() -> None:
    seen = load(1.0, GOOD, GOOD, GOOD, LATE)
    assert seen.goodput == 1.5
    assert seen.goodput_by_key() == {"flood": 1.0, "key 1": 0.5, "key 2": 0, "key 3": 0, "key 4": 0}
    assert seen.good_share_by_priority() == {"0": 0.75}


def test_a_row_tells_refused_from_failed() -> None:
    fields = row(load(3.0, GOOD, LATE, REFUSED, REFUSED, BROKEN, CUT)).split()
    assert fields[:8] == ["3", "x", "3.00", "3", "2", "1", "1", "0.50"]


def test_the_verdict_compares_the_last_load_with_the_best_one() -> None:
    text = verdict([load(1.0, *[GOOD] * 10), load(3.0, *[GOOD] * 8, REFUSED, BROKEN)])
    assert "goodput at 3 x: 80% of its peak" in text
    assert "sends 5 times as much has 4.00 times the others' goodput" in text
    assert "Retry-After at 3 x: median 4 s" in text
    assert "1 failed: HTTP 503: gone" in text


async def test_each_rate_is_measured_twice_and_its_halves_are_added() -> None:
    refusing = httpx.MockTransport(lambda request: httpx.Response(429, headers={"Retry-After": "2"}))
    async with httpx.AsyncClient(base_url="http://server", transport=refusing) as http:
        found = await loads(http, per_s=100.0, seconds=0.2, seed=1)
    assert [seen.factor for seen in found] == list(FACTORS)
    assert all(seen.seconds == pytest.approx(0.2) for seen in found)
    assert all(len(seen.calls) == len(seen.outcomes) > 0 for seen in found)
    assert "goodput at 3 x: 0% of its peak" in verdict(found)


def test_one_key_sends_five_times_as_many_as_each_other() -> None:
    rng = random.Random(1)
    keys = [new_call(rng).headers["Authorization"] for _ in range(3000)]
    counts = {name: keys.count(f"Bearer {name}") for name in KEYS}
    others = [count for name, count in counts.items() if name != "flood"]
    assert all(4 < counts["flood"] / count < 6 for count in others)
