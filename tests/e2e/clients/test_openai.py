"""OpenAI's own client, as its users write it: everything it can send goes through both workers."""

import math
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
RIVERS = [{"role": "user", "content": "Name three rivers."}]
STORY = "Once upon a time, in a small village by the sea, there lived"


@pytest.fixture
async def client(split: RunningCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(trust_env=False, timeout=120)
    async with openai.AsyncOpenAI(
        base_url=f"{split.url}/v1", api_key="none", max_retries=0, http_client=http
    ) as client:
        yield client


@pytest.fixture
def sync_client(split: RunningCluster) -> Iterator[openai.OpenAI]:
    http = httpx.Client(trust_env=False, timeout=120)
    with openai.OpenAI(base_url=f"{split.url}/v1", api_key="none", max_retries=0, http_client=http) as client:
        yield client


async def test_the_stream_helper_ends_with_the_answer_that_is_given_whole(client: openai.AsyncOpenAI) -> None:
    """Two choices with log-probabilities, events of the helper on the way."""
    asked = {
        "model": MODEL,
        "messages": CAPITAL,
        "n": 2,
        "seed": 11,
        "temperature": 0.7,
        "max_completion_tokens": 100,
        "stop": ".",  # the helper takes an answer that ends for its length for an error
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = await client.chat.completions.create(**asked)
    seen: dict[str, int] = {}
    async with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        async for event in stream:
            seen[event.type] = seen.get(event.type, 0) + 1
        streamed = await stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= set(seen)
    assert (streamed.usage.prompt_tokens, streamed.usage.completion_tokens) == (  # what is cached may differ
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert [choice.index for choice in whole.choices] == [0, 1]
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert one.message.content == other.message.content
        assert one.finish_reason == other.finish_reason == "stop"
        assert one.logprobs == other.logprobs
        tokens = one.logprobs.content
        assert "".join(token.token for token in tokens).startswith(one.message.content)
        for token in tokens:
            assert bytes(token.bytes).decode(errors="replace") == token.token
            tops = [top.logprob for top in token.top_logprobs]
            assert len(tops) == 3
            assert tops == sorted(tops, reverse=True)
            assert max(tops[0], token.logprob) == tops[0] <= 0


def test_a_list_of_prompts_is_answered_in_order_with_echo_and_logprobs(sync_client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": [STORY, [504, 3575, 282]], "max_tokens": 6, "temperature": 0}
    whole = sync_client.completions.create(**asked, n=2, echo=True, logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    first = whole.choices[0]
    assert first.text == whole.choices[1].text
    assert first.text.startswith(STORY)
    assert "".join(first.logprobs.tokens) == first.text
    assert first.logprobs.token_logprobs[0] is None
    assert all(logprob <= 0 for logprob in first.logprobs.token_logprobs[1:])
    offset = first.logprobs.text_offset[-1]
    assert first.text[offset:] == first.logprobs.tokens[-1]
    pieces = ["", ""]
    for chunk in sync_client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
    assert [STORY + pieces[0], pieces[1]] == [first.text, whole.choices[2].text[-len(pieces[1]) :]]
    assert whole.usage.completion_tokens == 24


async def test_bias_stop_and_seed_do_what_their_names_say(client: openai.AsyncOpenAI) -> None:
    async def told(**more: object) -> tuple[str, str]:
        answer = await client.completions.create(
            **{"model": MODEL, "prompt": STORY, "max_tokens": 12, "temperature": 0, "logprobs": 0, **more}
        )
        return answer.choices[0].text, answer.choices[0].finish_reason

    free, _ = await told()
    biased = await client.completions.create(
        model=MODEL,
        prompt=STORY,
        max_tokens=4,
        temperature=0,
        logit_bias={"504": 100},
        extra_body={"return_token_ids": True},
    )
    assert biased.choices[0].token_ids == [504] * 4
    stop = free[7:12]
    assert await told(stop=["never said", stop]) == (free[: free.index(stop)], "stop")
    assert await told(stop=stop, extra_body={"include_stop_str_in_output": True}) == (
        free[: free.index(stop) + len(stop)],
        "stop",
    )
    drawn = [await told(temperature=1, seed=seed) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    unit: Literal["celsius", "fahrenheit"]


class Route(BaseModel):
    """A way from one city to another."""

    start: str
    end: str


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Route)]
WEATHER = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "Route"}}], ids=["required", "named"]
)
async def test_calls_of_tools_are_parsed_into_their_models(client: openai.AsyncOpenAI, choice: Any) -> None:
    asked = {
        "model": MODEL,
        "messages": WEATHER,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 200,
    }
    whole = (await client.chat.completions.parse(**asked)).choices[0]
    async with client.chat.completions.stream(**asked) as stream:
        events = [event async for event in stream]
        streamed = (await stream.get_final_completion()).choices[0]
    (done,) = (event for event in events if event.type == "tool_calls.function.arguments.done")
    for told in (whole, streamed):
        (call,) = told.message.tool_calls
        assert isinstance(call.function.parsed_arguments, Weather | Route)
        assert choice == "required" or isinstance(call.function.parsed_arguments, Route)
        assert not told.message.content
    assert whole.finish_reason == streamed.finish_reason
    assert call.function.arguments == whole.message.tool_calls[0].function.arguments == done.arguments


Short = Annotated[str, Field(max_length=20)]


class City(BaseModel):
    name: Short
    country: Literal["France", "Italy", "Spain"]
    rivers: Annotated[list[Short], Field(max_length=3)]


@pytest.mark.parametrize("n", [1, 2])
async def test_answers_are_parsed_into_the_models_that_were_asked_for(
    client: openai.AsyncOpenAI, n: int
) -> None:
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Tell me about Paris, as JSON."}],
        "response_format": City,
        "seed": 3,
        "n": n,
        "max_tokens": 300,
    }
    whole = await client.chat.completions.parse(**asked)
    async with client.chat.completions.stream(**asked) as stream:
        streamed = await stream.get_final_completion()
    assert len(whole.choices) == n
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert isinstance(one.message.parsed, City)
        assert one.message.parsed == other.message.parsed
    free = await client.chat.completions.create(
        model=MODEL,
        messages=CAPITAL,
        max_tokens=100,
        extra_body={"structured_outputs": {"choice": ["Rome", "Paris"]}},
    )
    assert free.choices[0].message.content in ("Rome", "Paris")


async def test_responses_go_on_after_each_other(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model=MODEL, input="Name the capital of France.", temperature=0)
    assert "Paris" in first.output_text
    asked = {"model": MODEL, "input": "Name the capital of Italy.", "temperature": 0, "max_output_tokens": 40}
    whole = await client.responses.create(**asked, previous_response_id=first.id)
    assert "Rome" in whole.output_text
    async with client.responses.stream(**asked, previous_response_id=first.id) as stream:
        pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        streamed = await stream.get_final_response()
    assert "".join(pieces) == streamed.output_text == whole.output_text
    assert (await client.responses.retrieve(whole.id)).output_text == whole.output_text
    parsed = await client.responses.parse(
        model=MODEL, input="Tell me about Rome, as JSON.", text_format=City, max_output_tokens=300
    )
    assert isinstance(parsed.output_parsed, City)
    await client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as gone:
        await client.responses.create(**asked, previous_response_id=first.id)
    assert gone.value.param == "previous_response_id"


async def test_a_conversation_goes_on_after_a_call(client: openai.AsyncOpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "Weather", "arguments": "{}"}}
    said = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is sunny and 21 degrees in Paris."},
    ]
    answer = await client.chat.completions.create(
        model=MODEL, messages=WEATHER + said, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=40
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content


async def test_errors_are_the_exceptions_that_the_client_documents(client: openai.AsyncOpenAI) -> None:
    asked = {"model": MODEL, "messages": CAPITAL}
    for bad, param in (
        ({"temperature": 9}, "temperature"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logit_bias": {"504": 101}}, "logit_bias.504"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**asked | bad)
        assert refused.value.param == param
        assert refused.value.type == "invalid_request_error"
        assert refused.value.request_id
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.models.retrieve("gpt-5")
    assert unknown.value.code == "model_not_found"
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "diptych"


async def test_a_client_that_gives_up_leaves_nothing_behind(
    client: openai.AsyncOpenAI, split: RunningCluster
) -> None:
    """By its time-out, whole and in the middle of a stream; `everything_comes_back` sees to the workers."""
    long = {"model": MODEL, "messages": RIVERS, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    before = (await split.gateway_metrics()).value("diptych_gateway_requests_total", outcome="cancelled")
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.3).chat.completions.create(**long)
    stream = await client.chat.completions.create(**long, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await split.await_quiet()
    after = (await split.gateway_metrics()).value("diptych_gateway_requests_total", outcome="cancelled")
    assert after == before + 2


async def test_logprobs_are_of_the_model_s_own_distribution(client: openai.AsyncOpenAI) -> None:
    """Temperature, penalties and bias change what is drawn, not what is told of the first token."""
    told = []
    for more in ({}, {"temperature": 0.2, "logit_bias": {"504": -50}, "frequency_penalty": 1.0}):
        answer = await client.chat.completions.create(
            model=MODEL, messages=CAPITAL, max_tokens=1, seed=1, logprobs=True, top_logprobs=20, **more
        )
        told.append({top.token: top.logprob for top in answer.choices[0].logprobs.content[0].top_logprobs})
    assert told[0].keys() == told[1].keys()
    assert all(math.isclose(told[0][token], told[1][token], abs_tol=1e-4) for token in told[0])
    assert 0.5 < sum(map(math.exp, told[0].values())) <= 1.0001
