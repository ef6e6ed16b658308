"""What an answer shows of its prompt, whatever became of the attempts before."""

from collections.abc import AsyncGenerator

import pytest

from services.core.errors import EngineFailed, WorkerLost
from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.core.sampling import SamplingParams
from services.gateway.path.generation import AttemptFailed, Event, Generation, Routed
from services.gateway.text.answer import TextDelta
from services.gateway.text.shown_prompt import ShownPrompt
from services.gateway.workers.worker_client import OutputToken, PrefillResult

PROMPT = [5, 6, 7, 8]
ROUTED = Routed(None, None, None)  # type: ignore[arg-type]
TOKEN = OutputToken(0, 9, "length")


def part(first: int, end: int) -> PromptLogprobs:
    return PromptLogprobs.of(first, 0, [TokenLogprobs(-float(n), 1) for n in range(first, end)])


async def shown(*bursts: list[Event], prompt: list[int] = PROMPT) -> list[float]:
    """The logprobs of the prompt in the first delta."""
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    subject = ShownPrompt(Generation("r", prompt, sampling, deadline=1.0))

    async def coming() -> AsyncGenerator[list[Event], None]:
        for burst in bursts:
            yield burst

    async def deltas() -> AsyncGenerator[list[TextDelta], None]:
        async for burst in subject.heard(coming()):
            if TOKEN in burst:
                yield [TextDelta("text", "length")]

    ((opening, _),) = [burst async for burst in subject.opening(deltas())]
    assert opening.prompt is not None
    return [token.logprob for piece in opening.prompt.parts for token in piece.tokens()]


async def test_parts_come_together_in_order() -> None:
    assert await shown([ROUTED], [part(1, 3)], [part(3, 4), TOKEN]) == [-1, -2, -3]


async def test_what_a_failed_attempt_gave_is_replaced_by_that_of_the_next_one() -> None:
    failed = AttemptFailed(WorkerLost("gone"))
    bursts: list[list[Event]] = [[ROUTED], [part(1, 3)], [failed], [ROUTED], [part(1, 2), part(2, 4), TOKEN]]
    assert await shown(*bursts) == [-1, -2, -3]


async def test_what_is_complete_stays_although_the_answer_goes_on_elsewhere() -> None:
    first = PrefillResult((TOKEN,), 0, 0.0, 0.0, prompt_logprobs=(part(1, 4),))
    failed = AttemptFailed(WorkerLost("gone"))
    assert await shown([ROUTED], [first], [failed], [ROUTED], [TOKEN]) == [-1, -2, -3]


async def test_a_prompt_of_one_token_has_none() -> None:
    assert await shown([ROUTED], [TOKEN], prompt=[5]) == []


async def test_a_worker_that_leaves_some_out_is_an_error() -> None:
    with pytest.raises(EngineFailed, match="logprobs"):
        await shown([ROUTED], [part(1, 3)], [TOKEN])


async def test_each_choice_begins_with_the_prompt_also_when_several_begin_at_once() -> None:
    generation = Generation(
        "r", PROMPT, SamplingParams(max_tokens=2), deadline=1.0, echo="prompt ", choices=3
    )

    async def deltas() -> AsyncGenerator[list[TextDelta], None]:
        yield [TextDelta("a", choice=1), TextDelta("b", choice=0), TextDelta("c", choice=1)]
        yield [TextDelta("d", choice=2), TextDelta("e", choice=0)]

    texts = ["", "", ""]
    async for burst in ShownPrompt(generation).opening(deltas()):
        for delta in burst:
            texts[delta.choice] += delta.text
    assert texts == ["prompt be", "prompt ac", "prompt d"]
