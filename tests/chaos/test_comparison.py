"""Every choice of an answer is compared with the undisturbed one, and is whole by itself."""

import json

import httpx
import pytest

from tests.chaos.comparison import compare, compare_all
from tests.chaos.reply import Choice, Reply
from tests.chaos.report import Findings
from tests.chaos.workload import Ask

ASK = Ask(3, "greedy", "/v1/completions", {"max_tokens": 2, "n": 3})


def reply(prompt_tokens: int = 5, **last: object) -> Reply:
    """Three choices; `last`: what the last one has otherwise."""
    fields = {"token_ids": [5, 6], "text": "ef", "finish": "length", **last}
    choices = [Choice([1, 2], "ab", "length"), Choice([3], "c", "stop"), Choice(**fields)]
    return Reply(ASK, 0.0, choices, usage={"prompt_tokens": prompt_tokens})


def differences(one: Reply) -> list[str]:
    findings = Findings(60, 1, "grpc")
    compare(findings, one, reply())
    return findings.different


def test_equal_answers_are_not_different() -> None:
    assert differences(reply()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token_ids": [5, 7]}, "choice 2: its tokens are [5, 7]"),
        ({"token_ids": [5]}, "choice 2: its tokens are [5]"),
        ({"text": "ex"}, "choice 2: its text is 'ex'"),
        ({"finish": "stop"}, "choice 2: its text is 'ef' (stop)"),
        ({"logprobs": [-0.5]}, "choice 2: its logprobs are [-0.5]"),
        ({"prompt_tokens": 15}, "its prompt_tokens are 15"),
    ],
)
def test_an_answer_that_differs_in_one_choice_or_in_its_prompt_is_different(changes: dict, said: str) -> None:
    (found,) = differences(reply(**changes))
    assert said in found


def test_logprobs_are_read_from_chats_and_completions_in_pieces() -> None:
    chat, completion = Choice(), Choice()
    for last in (None, "stop"):
        content = [{"token": "a", "logprob": -0.5, "top_logprobs": []}]
        chat.take({"delta": {"content": "a"}, "logprobs": {"content": content}, "finish_reason": last})
        completion.take(
            {
                "text": "a",
                "logprobs": {"token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]},
                "finish_reason": last,
            }
        )
    assert [token["logprob"] for token in chat.logprobs] == [-0.5, -0.5]
    assert completion.logprobs == [(-0.5, {"a": -0.5})] * 2


def test_choices_in_another_order_are_different() -> None:
    swapped = reply()
    swapped.choices[:2] = reversed(swapped.choices[:2])
    assert "choice 0" in differences(swapped)[0]


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
        await compare_all(findings, {}, http)
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
