"""Greedy answers are token for token those of an independent implementation of the model.

By default twelve of the sixty prompts run; `make test-full` runs all.
"""

import asyncio
import math
from collections.abc import Sequence

import pytest

from services.model.files import open_model
from tests.support.cluster import RunningCluster
from tests.support.completions import Answer, complete, greedy
from tests.support.prompts import build_prompts, prompt_lengths
from tests.support.reference import Reference

NEW_TOKENS = 48
FEW = (1, 16, 33, 129, 404)
SAMPLE = (1, 15, 16, 17, 32, 33, 127, 128, 129, 404, 827, 1500)
ALL = pytest.param(tuple(prompt_lengths()), marks=pytest.mark.full, id="all")
CROWD = 16
PROMPTS_PER_TIE = 30  # at most one prompt in so many may meet a tie


class Asked:
    """The answers to all prompts, each asked once per cluster and concurrency."""

    def __init__(self, prompts: list[list[int]]) -> None:
        self.prompts = {len(prompt): prompt for prompt in prompts}
        self._answers: dict[tuple[RunningCluster, int, int], Answer] = {}

    async def answers(
        self, cluster: RunningCluster, lengths: Sequence[int], concurrency: int
    ) -> dict[int, Answer]:
        """By prompt length. Nothing is shared between concurrencies, the prefix cache included."""
        turns = asyncio.Semaphore(concurrency)
        async with cluster.http() as http:

            async def ask(length: int) -> None:
                body = greedy(self.prompts[length], NEW_TOKENS) | {"cache_salt": f"at {concurrency}"}
                async with turns:
                    self._answers[cluster, concurrency, length] = await complete(http, body)

            missing = [n for n in lengths if (cluster, concurrency, n) not in self._answers]
            await asyncio.gather(*(ask(length) for length in missing))
        return {length: self._answers[cluster, concurrency, length] for length in lengths}


@pytest.fixture(scope="module")
def asked(default_model) -> Asked:
    return Asked(build_prompts(open_model(default_model).tokenizer()))


def check(asked: Asked, reference: Reference, answers: dict[int, Answer]) -> None:
    ties = {n: reference.check_greedy(asked.prompts[n], answer.token_ids) for n, answer in answers.items()}
    tied = [length for length, count in ties.items() if count]
    print(f"{len(answers)} prompts, {sum(ties.values())} ties, in the prompts of length {tied}")
    assert len(tied) <= math.ceil(len(answers) / PROMPTS_PER_TIE)
    assert all(len(answer.token_ids) == NEW_TOKENS for answer in answers.values())


async def test_without_a_compiler_a_cluster_computes_in_float32_and_says_so_once(exact_split) -> None:
    warnings = [line for line in exact_split.said.splitlines() if line.startswith("warning")]
    (warning,) = warnings
    assert "2 to 6 times as long" in warning
    assert "no-such-compiler" in warning
    assert {report.compatibility.quantization for report in await exact_split.reports()} == {"none"}
    assert {report.compatibility.kv_dtype for report in await exact_split.reports()} == {"float32"}


async def test_the_reference_refuses_an_answer_with_one_wrong_token(exact_split, asked, reference) -> None:
    answer = (await asked.answers(exact_split, [33], concurrency=1))[33]
    wrong = [*answer.token_ids[:40], answer.token_ids[40] + 1, *answer.token_ids[41:]]
    with pytest.raises(AssertionError, match="token 40 of the answer"):
        reference.check_greedy(asked.prompts[33], wrong)


@pytest.mark.parametrize("lengths", [pytest.param(SAMPLE, id="sample"), ALL])
async def test_disaggregated_answers_are_the_references(exact_split, asked, reference, lengths) -> None:
    answers = await asked.answers(exact_split, lengths, concurrency=1)
    for answer in answers.values():
        workers = (answer.timings["prefill_worker"], answer.timings["decode_worker"])
        assert workers == ("prefill-0", "decode-0")
        assert answer.timings["attempts"] == 1
    check(asked, reference, answers)


@pytest.mark.parametrize("lengths", [pytest.param(FEW, id="few"), ALL])
async def test_answers_of_a_decode_worker_alone_are_the_references(
    exact_alone, asked, reference, lengths
) -> None:
    answers = await asked.answers(exact_alone, lengths, concurrency=1)
    assert {answer.timings["prefill_worker"] for answer in answers.values()} == {None}
    check(asked, reference, answers)


@pytest.mark.parametrize("lengths", [pytest.param(SAMPLE, id="sample"), ALL])
async def test_an_answer_is_the_same_alone_and_in_a_crowd(exact_split, asked, reference, lengths) -> None:
    solo = await asked.answers(exact_split, lengths, concurrency=1)
    crowded = await asked.answers(exact_split, lengths, concurrency=CROWD)
    different = [n for n in lengths if solo[n].token_ids != crowded[n].token_ids]
    print(f"{len(different)} of {len(lengths)} answers differ in a crowd of {CROWD}: lengths {different}")
    # Another batch is another order of sums: answers may part at a tie, and only there.
    check(asked, reference, crowded)
    assert len(different) <= math.ceil(len(lengths) / PROMPTS_PER_TIE)
