"""The mixed load: reproducible, and as mixed as its name says."""

from loadtest.workload import MAX_TOKENS, mixed_calls


def test_the_same_seed_gives_the_same_calls_and_another_seed_others() -> None:
    calls = list(mixed_calls("m", 50, 0.2, seed=3))
    assert calls == list(mixed_calls("m", 50, 0.2, seed=3))
    assert calls != list(mixed_calls("m", 50, 0.2, seed=4))


def test_all_kinds_of_requests_occur() -> None:
    calls = list(mixed_calls("m", 500, 0.2, seed=1))
    assert len(calls) == 500
    assert {call.kind for call in calls} == {
        "chat, whole",
        "chat, streamed",
        "completion, whole",
        "completion, streamed",
    }
    assert {call.body["max_tokens"] for call in calls} == set(range(1, MAX_TOKENS + 1))
    for field in ("stop", "seed", "top_p", "top_k", "min_p"):
        assert 0 < sum(field in call.body for call in calls) < 500
    assert 0 < sum(call.body["temperature"] == 0 for call in calls) < 500


def test_about_the_share_that_was_asked_for_hangs_up_in_both_ways() -> None:
    plans = [call.cancel for call in mixed_calls("m", 500, 0.2, seed=1) if call.cancel]
    assert 75 <= len(plans) <= 125
    assert all((plan.after_s is None) != (plan.after_chunks is None) for plan in plans)
    assert len({plan.after_s is None for plan in plans}) == 2


def test_nobody_hangs_up_when_nobody_should() -> None:
    assert all(call.cancel is None for call in mixed_calls("m", 100, 0.0, seed=1))
