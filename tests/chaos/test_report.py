"""A chaos run passes only if nothing failed, was miscounted or was left over."""

import pytest

from tests.chaos.reply import Choice, Reply
from tests.chaos.report import Findings, Report
from tests.chaos.workload import Ask

ASK = Ask(3, "greedy", "/v1/completions", {"max_tokens": 2, "n": 2})
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def reply(**changes: object) -> Reply:
    choices = [Choice([1, 2], "ab", "length"), Choice([3], "c", "stop")]
    return Reply(ASK, 0.0, **{"choices": choices, "usage": USAGE, "end": "completed", **changes})


def report(*replies: Reply, **found: object) -> Report:
    findings = Findings(60, 1, "nixl,grpc")
    findings.replies = list(replies)
    for name, value in found.items():
        setattr(findings, name, value)
    return findings.report()


def test_a_run_without_findings_passes() -> None:
    assert report(reply()).violations == []


@pytest.mark.parametrize(
    ("replies", "found", "violation"),
    [
        ([reply(), reply(end="failed", problem="HTTP 503")], {}, "1 failed requests"),
        ([reply(usage=USAGE | {"completion_tokens": 2, "total_tokens": 7})], {}, "1 usage mistakes"),
        ([reply(usage=USAGE | {"total_tokens": 13})], {}, "1 usage mistakes"),
        ([reply()], {"held": ["decode-0 has 3 used blocks"]}, "1 things left over"),
        ([reply()], {"different": ["request 3"]}, "1 answers that differ from the undisturbed run's"),
        ([reply(end="hung_up")], {}, "no answer was completed"),
    ],
)
def test_each_finding_is_a_violation(replies: list[Reply], found: dict, violation: str) -> None:
    assert report(*replies, **found).violations == [violation]


def test_the_longest_pause_is_one_choices_and_the_first_token_any_choices() -> None:
    early, late = Choice(arrivals_s=[2.0, 2.1, 5.1]), Choice(arrivals_s=[1.0, 3.5])
    seen = reply(choices=[early, late])
    assert seen.longest_pause == (pytest.approx(3.0), 2.1)
    assert seen.first_token_s == 1.0


def test_a_report_says_how_kv_travelled() -> None:
    text = str(report(reply(), over_grpc={"gRPC alone: no NIXL here": 2}))
    assert "nixl,grpc" in text
    assert "2 x gRPC alone: no NIXL here" in text
