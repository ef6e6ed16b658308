"""Every choice of an answer is compared with the undisturbed one, and is whole by itself."""

import json
from pathlib import Path

import httpx
import pytest

from tests.chaos.comparison import compare, compare_all
from tests.chaos.reply import Choice, Reply
from tests.chaos.report import Findings
from tests.chaos.ties import TieJudge
from tests.chaos.workload import Ask

ASK = Ask(3, "greedy", "/v1/completions", {"max_tokens": 2, "n": 3})


class Judge(TieJudge):
    """Knows the choice that parts at a tie."""

    def __init__(self, tie_at: int | None) -> None:
        super().__init__(Path("unused"))
        self._tie_at = tie_at

    async def parts_at_tie(self, ask: Ask, choice: int, one: list[int], other: list[int]) -> bool:
        return choice == self._tie_at


def reply(prompt_tokens: int = 5, **last: object) -> Reply:
    """Three choices; `last`: what the last one has otherwise."""
    fields = {"token_ids": [5, 6], "text": "ef", "finish": "length", **last}
    choices = [Choice([1, 2], "ab", "length"), Choice([3], "c", "stop"), Choice(**fields)]
    return Reply(ASK, 0.0, choices, usage={"prompt_tokens": prompt_tokens})


async def found(one: Reply, tie_at: int | None = None) -> Findings:
    findings = Findings(60, 1, "grpc")
    await compare(findings, one, reply(), Judge(tie_at))
    return findings


async def test_equal_answers_are_not_different() -> None:
    assert (await found(reply())).different == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_ids": [5, 7]}, "choice 2: its tokens are [5, 7]"),
        ({"token_ids": [5]}, "choice 2: its tokens are [5]"),
        ({"text": "ex"}, "choice 2: its text is 'ex'"),
        ({"finish": "stop"}, "choice 2: its text is 'ef' (stop)"),
        ({"prompt_tokens": 15}, "its prompt_tokens are 15"),
    ],
)
async def test_an_answer_that_differs_in_one_choice_or_in_its_prompt_is_different(
    changes: dict, said: str
) -> None:
    findings = await found(reply(**changes))
    assert len(findings.different) == 1
    assert said in findings.different[0]


async def test_a_tie_of_one_choice_excuses_that_choice_alone() -> None:
    at_tie = await found(reply(token_ids=[5, 7]), tie_at=2)
    assert (at_tie.different, at_tie.ties) == ([], 1)
    other = reply(token_ids=[5, 7])
    other.choices[0].text = "ax"
    differs = await found(other, tie_at=2)
    assert differs.ties == 1
    assert "choice 0" in differs.different[0]
    assert "choice 2" not in differs.different[0]


async def test_choices_in_another_order_are_different() -> None:
    swapped = reply()
    swapped.choices[:2] = reversed(swapped.choices[:2])
    assert "choice 0" in (await found(swapped)).different[0]


@pytest.mark.parametrize("same", [True, False])
async def test_a_resumed_answer_to_a_drawn_seed_is_compared_with_one_asked_for_with_that_seed(
    same: bool,
) -> None:
    def say(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        asked.append(body)
        token = 1 if same else 2
        choices = [
            {"index": n, "text": "a", "token_ids": [token], "finish_reason": "stop"} for n in range(body["n"])
        ]
        usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
        return httpx.Response(200, json={"choices": choices, "usage": usage, "timings": {"attempts": 1}})

    asked: list[dict] = []
    ask = Ask(2, "unseeded", "/v1/completions", {"max_tokens": 2, "n": 2})
    two = [Choice([1], "a", "stop"), Choice([1], "a", "stop")]
    timings = {"attempts": 3, "seed": 77}
    resumed = Reply(ask, 0.0, two, {"prompt_tokens": 5}, timings, end="completed")
    at_once = Reply(ask, 0.0, two, {"prompt_tokens": 5}, timings | {"attempts": 1}, end="completed")
    findings = Findings(60, 1, "grpc")
    findings.replies = [resumed, at_once]
    async with httpx.AsyncClient(transport=httpx.MockTransport(say), base_url="http://server") as http:
        await compare_all(findings, {}, Judge(tie_at=None), http)
    assert asked == [ask.body | {"seed": 77}]
    assert findings.unseeded_checked == 1
    assert len(findings.different) == (0 if same else 1)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"finish": None}, "choice 2: finish_reason is None"),
        ({"token_ids": [5]}, "choice 2: it ended for its length after 1 of 2 tokens"),
        ({"token_ids": [5, 6, 7]}, "choice 2: 3 tokens came, 1 to 2 were asked for"),
    ],
)
def test_an_answer_with_an_incomplete_choice_is_not_whole(last: dict, said: str) -> None:
    assert reply().mistakes() == ""
    assert reply(**last).mistakes() == said


def test_a_choice_that_goes_on_after_its_end_is_refused() -> None:
    choice = Choice()
    choice.take({"index": 1, "text": "a", "finish_reason": "stop", "token_ids": [1]})
    with pytest.raises(ValueError, match="choice 1 went on after its end"):
        choice.take({"index": 1, "text": "b", "finish_reason": None, "token_ids": [2]})
