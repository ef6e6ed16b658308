"""The load test's numbers."""

from loadtest.call import Outcome
from loadtest.summary import Summary, percentile


def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed() -> None:
    ordered = [float(n) for n in range(1, 101)]
    assert [percentile(ordered, p) for p in (1, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([5.0], 50) == 5.0


def test_outcomes_are_counted_by_their_end_and_problems_by_their_words() -> None:
    summary = Summary.of(
        [
            Outcome("chat, streamed", "completed", tokens=4, first_token_s=0.2, gaps_s=(0.03, 0.01)),
            Outcome("chat, streamed", "completed", tokens=6, first_token_s=0.1),
            Outcome("chat, whole", "cancelled"),
            Outcome("chat, whole", "failed", "HTTP 500"),
            Outcome("chat, whole", "failed", "HTTP 500"),
        ],
        seconds=2.0,
    )
    assert (summary.completed, summary.cancelled, summary.failed) == (2, 1, 2)
    assert summary.first_token_s == (0.1, 0.2)
    assert summary.gaps_s == (0.01, 0.03)
    assert summary.problems == {"HTTP 500": 2}
    text = str(summary)
    assert "tokens/s of completed answers: 5.0" in text
    assert "p50 100 ms" in text
    assert "2 failed: HTTP 500" in text
