"""A chaos run passes only if nothing failed, differed, was miscounted or was left over."""

from collections import Counter

import pytest

from tests.chaos.client import Reply
from tests.chaos.report import Findings, Report
from tests.chaos.run import difference
from tests.chaos.workload import Ask

ASK = Ask(3, "greedy", "/v1/completions", {"max_tokens": 2})
USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def reply(**changes: object) -> Reply:
    fields = {"token_ids": [1, 2], "text": "ab", "finish": "length", "usage": USAGE, "end": "completed"}
    return Reply(ASK, sent_s=0.0, **{**fields, **changes})


def report(*replies: Reply, **found: object) -> Report:
    findings = Findings()
    findings.replies = list(replies)
    for name, value in found.items():
        setattr(findings, name, value)
    return findings.report(60, 1, Counter(), {})


def test_a_run_without_findings_passes() -> None:
    assert report(reply()).violations == []


@pytest.mark.parametrize(
    ("replies", "found", "violation"),
    [
        ([reply(), reply(end="failed", problem="HTTP 503")], {}, "1 failed requests"),
        ([reply(usage=USAGE | {"completion_tokens": 3})], {}, "1 usage mistakes"),
        ([reply(usage=USAGE | {"total_tokens": 8})], {}, "1 usage mistakes"),
        ([reply()], {"held": ["decode-0 has 3 used blocks"]}, "1 things left over"),
        ([reply()], {"different": ["request 3"]}, "1 answers that differ from the undisturbed run's"),
        ([reply(end="hung_up")], {}, "no answer was completed"),
    ],
)
def test_each_finding_is_a_violation(replies: list[Reply], found: dict, violation: str) -> None:
    assert report(*replies, **found).violations == [violation]


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [1, 3]},
        {"token_ids": [1]},
        {"text": "ax"},
        {"finish": "stop"},
        {"usage": USAGE | {"prompt_tokens": 6}},
    ],
)
def test_an_answer_that_differs_anywhere_is_different(changes: dict) -> None:
    assert difference(reply(), reply()) == ""
    assert difference(reply(**changes), reply())
