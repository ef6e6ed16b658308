"""The Responses API on a real cluster, with its conversations in a real Redis, through OpenAI's clients."""

import asyncio

import openai
import pytest

from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL

ASK = {"model": MODEL, "input": "Name the capital of France.", "temperature": 0, "max_output_tokens": 24}


def talk(cluster: RunningCluster) -> tuple[str, str, str]:
    """Whole, streamed, and what goes on from the streamed one, with the synchronous client."""
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="mine", max_retries=0) as client:
        whole = client.responses.create(**ASK)
        with client.responses.stream(**ASK) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            streamed = stream.get_final_response()
        assert text == streamed.output_text
        assert client.responses.retrieve(streamed.id).output_text == text
        more = {**ASK, "input": "And of Japan?", "previous_response_id": streamed.id}
        return whole.output_text, text, client.responses.create(**more).output_text


async def test_both_routes_give_the_same_answers_whole_streamed_and_in_a_conversation(split, alone) -> None:
    both, one = await asyncio.to_thread(talk, split), await asyncio.to_thread(talk, alone)
    assert both == one
    assert both[0] == both[1] != both[2]


async def test_a_response_is_the_chat_that_asks_for_the_same(split) -> None:
    async with openai.AsyncOpenAI(base_url=f"{split.url}/v1", api_key="mine", max_retries=0) as client:
        response = await client.responses.create(**ASK, instructions="Be brief.")
        chat = await client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": str(ASK["input"])},
            ],
            temperature=0,
            max_completion_tokens=24,
        )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert chat.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )


async def test_a_conversation_finds_its_prompt_cached_and_is_nobody_else_s(split) -> None:
    """Blocks are shared by key, as conversations are."""
    long = "Tell me about France. " * 20
    async with openai.AsyncOpenAI(base_url=f"{split.url}/v1", api_key="mine", max_retries=0) as client:
        first = await client.responses.create(**{**ASK, "input": long})
        second = await client.responses.create(**ASK, previous_response_id=first.id)
        other = client.with_options(api_key="another")
        with pytest.raises(openai.BadRequestError):
            await other.responses.create(**ASK, previous_response_id=first.id)
        await client.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(second.id)
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= 64
