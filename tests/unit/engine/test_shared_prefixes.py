"""Prompts that arrive together compute what they have in common once, where that is worth another step."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.step_model import StepWork
from services.core.block_hash import shared_blocks
from services.core.sampling import SamplingParams
from services.engine.block_pool import BlockPool
from services.engine.messages import Limits, Submit
from services.engine.scheduler import Chunk, Scheduler
from services.engine.sequence import Sequence
from services.engine.step_times import StepTimes

SIZE = 4
LIMITS = Limits(sequences_max=16, waiting_max=64, chunk_tokens_max=200, step_ms_target=100.0)
PREFIX = list(range(100, 140))


def times(step_ms: float, token_ms: float) -> StepTimes:
    """Of a worker whose steps take that long."""
    measured = StepTimes()
    for tokens in [*range(1, 200, 7)] * 4:
        measured.add(step_ms + token_ms * tokens, StepWork(tokens))
    return measured


def sequence(seq_id: str, prompt: list[int]) -> Sequence:
    submit = Submit(seq_id, "local", prompt, [], SamplingParams(max_tokens=4))
    return Sequence(submit, b"root", 0.0)


class Worker:
    """A scheduler whose chunks are computed at once; who ends leaves its blocks in the cache."""

    def __init__(self, measured: StepTimes) -> None:
        self._pool = BlockPool(256, SIZE)
        self._scheduler = Scheduler(self._pool, LIMITS)
        self._times = measured

    def steps(self, *prompts: Iterable[int]) -> list[dict[str, int]]:
        """The tokens that each step computes of each prompt, by its number."""
        for number, prompt in enumerate(prompts):
            self._scheduler.waiting.append(sequence(str(number), list(prompt)))
        steps: list[dict[str, int]] = []
        while chunks := self._scheduler.schedule(self._times):
            steps.append({chunk.sequence.seq_id: chunk.tokens for chunk in chunks})
            for chunk in chunks:
                self._compute(chunk)
        return steps

    def _compute(self, chunk: Chunk) -> None:
        chunk.sequence.computed += chunk.tokens
        chunk.sequence.seal(self._pool, chunk.sequence.computed)
        if chunk.sequence.computed == chunk.sequence.known:
            self._scheduler.remove(chunk.sequence)


@pytest.fixture
def cheap_steps() -> Worker:
    return Worker(times(step_ms=1.0, token_ms=1.0))


def test_one_that_shares_a_prefix_with_this_step_waits_for_the_next(cheap_steps) -> None:
    assert cheap_steps.steps([*PREFIX, 1, 2], [*PREFIX, 3], PREFIX) == [{"0": 42}, {"1": 1, "2": SIZE}]


def test_others_pass_those_that_wait(cheap_steps) -> None:
    assert cheap_steps.steps([*PREFIX, 1], [*PREFIX, 2], [5] * 9) == [{"0": 41, "2": 9}, {"1": 1}]


def test_what_is_cached_already_is_not_waited_for(cheap_steps) -> None:
    cheap_steps.steps(PREFIX)
    assert cheap_steps.steps([*PREFIX, 1], [*PREFIX, 2]) == [{"0": 1, "1": 1}]


def test_chains_that_branch_wait_as_long_as_they_have_more_in_common(cheap_steps) -> None:
    one, two, three = ([*PREFIX, *[branch] * 8, branch] for branch in (1, 2, 2))
    assert cheap_steps.steps(one, two, three) == [{"0": 49}, {"1": 9}, {"2": 1}]


def test_nobody_waits_where_a_step_costs_more_than_the_tokens_it_saves() -> None:
    dear = Worker(times(step_ms=100.0, token_ms=0.5))
    assert dear.steps([*PREFIX, 1], [*PREFIX, 2]) == [{"0": 41, "1": 41}]


def test_before_anything_was_measured_computing_is_taken_to_be_dear() -> None:
    assert Worker(StepTimes()).steps([*PREFIX, 1], [*PREFIX, 2]) == [{"0": 41}, {"1": 1}]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=60))
def test_every_prompt_is_computed_and_each_of_its_blocks_once(prompts) -> None:
    steps = Worker(times(step_ms=0.001, token_ms=1.0)).steps(*prompts)
    assert {number for step in steps for number in step} == {str(number) for number in range(len(prompts))}
    blocks = {tuple(p[:end]) for p in prompts for end in range(SIZE, len(p) + 1, SIZE)}
    # Beside them: what is left after the last full block, or the last block again, for its logits.
    rest = sum((len(prompt) - 1) % SIZE + 1 for prompt in prompts)
    assert sum(tokens for step in steps for tokens in step.values()) <= SIZE * len(blocks) + rest


@given(*[st.lists(st.integers(0, 1), max_size=6)] * 3)
def test_shared_blocks_are_the_leading_equal_ones(common, one, other) -> None:
    def chain(tokens: list[int]) -> list[bytes]:
        return [bytes(tokens[: end + 1]) for end in range(len(tokens))]

    first, second = [*common, *one], [*common, *other]
    equal = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    expected = min(len(first), len(second)) if equal is None else equal
    assert shared_blocks(chain(first), chain(second)) == expected
