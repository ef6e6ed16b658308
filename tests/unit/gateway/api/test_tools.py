"""Chats with tools, the whole way: from OpenAI's client to a model that writes calls, and back."""

import json

import openai
import pytest
from pydantic import BaseModel

from services.core.errors import WorkerLost
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL

ARGUMENTS = '{"city": "Paris, \\"日本\\"", "unit": "C"}'
CALLS = (
    f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now", "description": "What time is it?"}}
HELLO = [{"role": "user", "content": "How is the weather in Paris?"}]
ASK = {"model": MODEL, "messages": HELLO, "tools": [WEATHER, NOW]}


@pytest.fixture
async def cluster(start_cluster):
    return await start_cluster(answer=CALLS)


@pytest.fixture
async def client(cluster):
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def found(message) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or []]


def prompt_of(cluster, call: int = 0) -> str:
    ids = cluster.workers.calls[call].sequence.prompt_ids
    return cluster.gateway.model.tokenizer.decode(ids, skip_special_tokens=False)


async def test_calls_come_beside_the_content(client) -> None:
    answer = (await client.chat.completions.create(**ASK)).choices[0]
    assert answer.message.content == "Let me see."
    assert found(answer.message) == [("get_weather", ARGUMENTS), ("now", "{}")]
    assert answer.finish_reason == "tool_calls"
    assert len({call.id for call in answer.message.tool_calls}) == 2


async def test_an_answer_of_calls_alone_has_no_content(start_cluster) -> None:
    cluster = await start_cluster(answer='<tool_call>{"name": "now", "arguments": {}}</tool_call>')
    answered = await cluster.http.post("/v1/chat/completions", json=ASK)
    message = answered.json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}


async def test_openai_s_stream_helper_puts_streamed_calls_together(client) -> None:
    async with client.chat.completions.stream(**ASK) as stream:
        kinds = [event.type async for event in stream]
        answer = (await stream.get_final_completion()).choices[0]
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert kinds.count("tool_calls.function.arguments.delta") > 5
    assert answer.message.content == "Let me see."
    assert found(answer.message) == [("get_weather", ARGUMENTS), ("now", "{}")]
    assert answer.finish_reason == "tool_calls"


async def test_a_pydantic_tool_gets_its_arguments_parsed(client) -> None:
    class Weather(BaseModel):
        city: str
        unit: str

    tool = openai.pydantic_function_tool(Weather, name="get_weather")
    answer = await client.chat.completions.parse(model=MODEL, messages=HELLO, tools=[tool])
    parsed = answer.choices[0].message.tool_calls[0].function.parsed_arguments
    assert parsed == Weather(city='Paris, "日本"', unit="C")


@pytest.mark.parametrize("stream", [False, True])
async def test_each_of_several_answers_has_calls_of_its_own(cluster, stream) -> None:
    """The second choice leaves out the first token, and so on."""
    body = {**ASK, "n": 3, "stream": stream}
    answered = await cluster.http.post("/v1/chat/completions", json=body)
    names: dict[int, list[str]] = {}
    if stream:
        events = [line[6:] for line in answered.text.splitlines() if line.startswith("data: {")]
        for choice in (choice for event in events for choice in json.loads(event)["choices"]):
            calls = choice["delta"].get("tool_calls", [])
            names.setdefault(choice["index"], []).extend(c["function"]["name"] for c in calls if "id" in c)
    else:
        for choice in answered.json()["choices"]:
            names[choice["index"]] = [call["function"]["name"] for call in choice["message"]["tool_calls"]]
    assert names == {n: ["get_weather", "now"] for n in range(3)}


@pytest.mark.parametrize("tokens", [3, 9, 15, 30])
@pytest.mark.parametrize("split", ["always", "never"])
async def test_a_worker_that_dies_within_a_call_changes_nothing(start_cluster, tokens, split) -> None:
    cluster = await start_cluster(answer=CALLS, route_split=split)
    fault = Fault(WorkerLost("gone"), after_tokens=tokens)
    cluster.workers.script(ANY_WORKER, "decode", fault)
    answered = await cluster.http.post("/v1/chat/completions", json={**ASK, "timings": True})
    answer = answered.json()
    assert answer["timings"]["attempts"] == 2
    calls = [call["function"] for call in answer["choices"][0]["message"]["tool_calls"]]
    assert calls == [
        {"name": "get_weather", "arguments": ARGUMENTS},
        {"name": "now", "arguments": "{}"},
    ]


async def test_usage_counts_the_tokens_of_calls_and_token_ids_are_all_there(cluster) -> None:
    answered = await cluster.http.post("/v1/chat/completions", json={**ASK, "return_token_ids": True})
    answer = answered.json()
    assert answer["usage"]["completion_tokens"] == len(cluster.answer_ids)
    assert answer["choices"][0]["token_ids"] == cluster.answer_ids


async def test_one_call_at_most_comes_if_parallel_calls_are_not_wanted(client) -> None:
    answer = await client.chat.completions.create(**ASK, parallel_tool_calls=False)
    assert found(answer.choices[0].message) == [("get_weather", ARGUMENTS)]


async def test_tools_that_must_not_be_called_are_neither_shown_nor_looked_for(cluster, client) -> None:
    answer = (await client.chat.completions.create(**ASK, tool_choice="none")).choices[0]
    assert (answer.message.content, answer.finish_reason) == (CALLS, "stop")
    assert "get_weather" not in prompt_of(cluster)
    await client.chat.completions.create(**ASK)
    assert "What time is it?" in prompt_of(cluster, -1)


async def test_only_allowed_tools_are_called_but_all_are_shown(cluster, client) -> None:
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = (await client.chat.completions.create(**ASK, tool_choice=choice)).choices[0]
    assert found(answer.message) == [("now", "{}")]
    assert "get_weather" in answer.message.content
    assert "get_weather" in prompt_of(cluster)


async def test_the_history_of_calls_goes_back_to_the_model(cluster, client) -> None:
    asked = (await client.chat.completions.create(**ASK)).choices[0].message
    result = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "12 degrees"}
    await client.chat.completions.create(**{**ASK, "messages": [*HELLO, asked, result]})
    assert f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}' in prompt_of(cluster, -1)
    assert "<tool_response>\n12 degrees\n</tool_response>" in prompt_of(cluster, -1)


async def test_who_offers_no_tools_gets_the_text_as_it_is(client) -> None:
    answer = (await client.chat.completions.create(model=MODEL, messages=HELLO)).choices[0]
    assert (answer.message.content, answer.message.tool_calls) == (CALLS, None)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_without_calls_is_the_plain_one(start_cluster, stream) -> None:
    cluster = await start_cluster()
    answered = await cluster.http.post("/v1/chat/completions", json={**ASK, "stream": stream})
    if stream:
        events = [json.loads(line[6:]) for line in answered.text.splitlines() if line.startswith("data: {")]
        deltas = [event["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
        assert not any("tool_calls" in delta for delta in deltas)
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = answered.json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_forced_calls_reach_every_worker_as_a_grammar(cluster, client, choice) -> None:
    answer = (await client.chat.completions.create(**ASK, tool_choice=choice)).choices[0]
    grammars = {call.sequence.sampling.grammar for call in cluster.workers.calls}
    assert len(grammars) == 1
    assert "get_weather" in next(iter(grammars))
    named = choice != "required"
    assert ("now" in next(iter(grammars))) is not named
    assert answer.finish_reason == ("stop" if named else "tool_calls")


@pytest.mark.parametrize(("choice", "answer"), [("auto", True), ("required", False), ("none", True)])
async def test_a_response_format_is_for_answers_and_leaves_calls_alone(cluster, choice, answer) -> None:
    schema = {"name": "s", "schema": {"type": "object", "properties": {"unlikely": {"type": "string"}}}}
    form = {"type": "json_schema", "json_schema": schema}
    body = {**ASK, "tool_choice": choice, "response_format": form}
    assert (await cluster.http.post("/v1/chat/completions", json=body)).status_code == 200
    grammar = cluster.workers.calls[-1].sequence.sampling.grammar
    assert ("unlikely" in grammar) is answer
    assert ("get_weather" in grammar) is (choice != "none")


async def test_the_final_message_may_be_continued(cluster) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "It is"}]
    body = {"model": MODEL, "messages": messages, "continue_final_message": True}
    assert (await cluster.http.post("/v1/chat/completions", json=body)).status_code == 200
    assert prompt_of(cluster).endswith("<|im_start|>assistant\nIt is")


async def test_the_begin_of_an_answer_may_be_left_out(cluster) -> None:
    body = {"model": MODEL, "messages": HELLO, "add_generation_prompt": False}
    assert (await cluster.http.post("/v1/chat/completions", json=body)).status_code == 200
    assert prompt_of(cluster).endswith("<|im_end|>\n")
