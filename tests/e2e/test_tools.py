"""Tool calls of the default model, which was not trained for them: forced, and the same on every route."""

from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.support.completions import MODEL

HELLO = [{"role": "user", "content": "What is the weather in Paris, in celsius? Use the tool."}]


class GetWeather(BaseModel):
    city: str
    unit: Literal["celsius", "fahrenheit"]


class Add(BaseModel):
    numbers: list[int]


TOOLS = [openai.pydantic_function_tool(GetWeather), openai.pydantic_function_tool(Add)]
NAMED = {"type": "function", "function": {"name": "Add"}}


@pytest.fixture
async def client(split):
    async with openai.AsyncOpenAI(base_url=f"{split.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_a_required_call_has_arguments_of_the_tool_s_type(client) -> None:
    answer = await client.chat.completions.parse(
        model=MODEL,
        messages=HELLO,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
    )
    choice = answer.choices[0]
    (call,) = choice.message.tool_calls
    assert isinstance(call.function.parsed_arguments, GetWeather | Add)
    assert choice.message.content is None
    assert choice.finish_reason == "tool_calls"


async def test_a_named_call_is_streamed_in_pieces(client) -> None:
    async with client.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=TOOLS, tool_choice=NAMED, seed=5, max_tokens=200, n=2
    ) as stream:
        kinds = [event.type async for event in stream]
        answer = await stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 2
    for choice in answer.choices:
        (call,) = choice.message.tool_calls
        assert call.function.name == "Add"
        assert choice.finish_reason == "stop"
        assert isinstance(call.function.parsed_arguments, Add)


async def test_calls_are_the_same_on_both_routes(split, alone) -> None:
    async def calls(cluster) -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(
                model=MODEL, messages=HELLO, tools=TOOLS, tool_choice="required", seed=3, max_tokens=60, n=3
            )
        return [
            [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
            for choice in answer.choices
        ]

    assert await calls(split) == await calls(alone)


async def test_a_tool_whose_schema_cannot_be_followed_is_the_client_s_error(client) -> None:
    schema = {"type": "object", "properties": {"x": {"not": {"const": 1}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[tool], tool_choice="required"
        )
    assert refused.value.param == "tools"


async def test_a_conversation_far_beyond_the_context_is_refused_at_once(client) -> None:
    messages = [{"role": "user", "content": "x" * 2_000_000}]
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model=MODEL, messages=messages)
    assert refused.value.code == "context_length_exceeded"
