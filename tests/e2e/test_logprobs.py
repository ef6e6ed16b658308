"""Logprobs of the real model are those of transformers: 1e-2 for a whole prompt, on every route."""

from typing import Any

import httpx
import pytest

from services.model.files import open_model
from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL
from tests.support.prompts import build_prompts
from tests.support.reference import Reference

LENGTHS = (2, 17, 129)


@pytest.fixture(scope="module")
def prompts(default_model) -> list[list[int]]:
    by_length = {len(prompt): prompt for prompt in build_prompts(open_model(default_model).tokenizer())}
    return [by_length[404][:length] for length in LENGTHS]


async def ask(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await http.post("/v1/completions", json={"model": MODEL, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def likelihood(choice: dict[str, Any]) -> tuple[float, bool]:
    """Of an echoed prompt after its first token, and whether it is what a greedy answer would be."""
    logprobs = choice["logprobs"]["token_logprobs"][1:-1]
    best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:-1]]
    return sum(logprobs), logprobs == best


async def test_prompts_are_as_likely_as_transformers_says_on_both_routes(
    exact_split: RunningCluster, exact_alone: RunningCluster, prompts: list[list[int]], reference: Reference
) -> None:
    """Asked and read as lm-eval does; twice, so that the second time the prompts are cached."""
    asked = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    answers = []
    for cluster in (exact_split, exact_alone):
        async with cluster.http() as http:
            answers += [await ask(http, **asked) for _ in range(2)]
    read = [[likelihood(choice) for choice in answer["choices"]] for answer in answers]
    for prompt, *scores in zip(prompts, *read, strict=True):
        rows = reference.logprobs(prompt)
        expected = sum(float(row[token]) for row, token in zip(rows, prompt[1:], strict=True))
        for logprob, is_greedy in scores:
            assert logprob == pytest.approx(expected, abs=1e-2)
            assert is_greedy == (rows.argmax(dim=-1).tolist() == prompt[1:])


async def test_an_answer_is_as_likely_as_transformers_says_on_both_routes(
    exact_split: RunningCluster, exact_alone: RunningCluster, prompts: list[list[int]], reference: Reference
) -> None:
    """The first token comes from the prefill worker, the others from the decode worker."""
    prompt = prompts[-1]
    body = {"prompt": prompt, "max_tokens": 9, "logprobs": 5, "ignore_eos": True, "return_token_ids": True}
    async with exact_split.http() as http, exact_alone.http() as lonely:
        both, one = await ask(http, **body), await ask(lonely, **body)
    (choice,), (other,) = both["choices"], one["choices"]
    assert choice["token_ids"] == other["token_ids"]
    rows = reference.logprobs([*prompt, *choice["token_ids"]])[-9:]
    for row, token, logprob, top in zip(
        rows,
        choice["token_ids"],
        choice["logprobs"]["token_logprobs"],
        choice["logprobs"]["top_logprobs"],
        strict=True,
    ):
        assert logprob == pytest.approx(float(row[token]), abs=1e-2)
        assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(5).values.tolist(), abs=1e-2)
    values = other["logprobs"]["token_logprobs"]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(values, abs=1e-3)


async def test_a_prompt_of_several_chunks_is_scored_once_for_each_token(
    exact_split: RunningCluster, reference: Reference
) -> None:
    prompt = [n * 7919 % 40_000 + 100 for n in range(700)]
    async with exact_split.http() as http:
        answer = await ask(http, prompt=prompt, max_tokens=0, echo=True, prompt_logprobs=20)
    scores = answer["choices"][0]["prompt_logprobs"]
    assert len(scores) == len(prompt)
    assert all(len(entries) in (20, 21) for entries in scores[1:])
    rows = reference.logprobs(prompt[:300])
    for row, token, entries in zip(rows, prompt[1:300], scores[1:300], strict=True):
        assert entries[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=1e-2)
