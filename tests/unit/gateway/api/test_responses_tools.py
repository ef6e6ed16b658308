"""Function calls in the Responses API: items of their own, in answers and in what goes on from them."""

import openai
import pytest

from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL

ARGUMENTS = '{"city": "Paris, \\"日本\\""}'
CALLS = (
    f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": CITY},
    {"type": "function", "name": "now", "description": "What time is it?"},
]
ASK = {"model": MODEL, "input": "How is the weather in Paris?", "tools": TOOLS}
CALL_EVENTS = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


@pytest.fixture
async def cluster(start_cluster):
    return await start_cluster(answer=CALLS)


@pytest.fixture
async def client(cluster):
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def prompt_of(cluster, call: int = -1) -> str:
    ids = cluster.workers.calls[call].sequence.prompt_ids
    return cluster.gateway.model.tokenizer.decode(ids, skip_special_tokens=False)


def calls_of(response) -> list[tuple[str, str, str]]:
    items = [item for item in response.output if item.type == "function_call"]
    return [(item.name, item.arguments, item.status) for item in items]


async def test_calls_are_items_behind_the_message(cluster, client) -> None:
    response = await client.responses.create(**ASK)
    assert [item.type for item in response.output] == ["message", "function_call", "function_call"]
    assert response.output_text == "Let me see."
    assert calls_of(response) == [("get_weather", ARGUMENTS, "completed"), ("now", "{}", "completed")]
    assert response.status == "completed"
    assert len({item.id for item in response.output}) == 3
    assert [tool.name for tool in response.tools] == ["get_weather", "now"]


async def test_the_client_s_helper_puts_streamed_calls_together(client) -> None:
    whole = await client.responses.create(**ASK)
    async with client.responses.stream(**ASK) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert calls_of(final) == calls_of(whole)
    of_call = [event.type for event in events if getattr(event, "output_index", None) == 1]
    assert list(dict.fromkeys(of_call)) == CALL_EVENTS
    assert of_call.count("response.function_call_arguments.delta") > 3
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_a_conversation_goes_on_with_what_the_calls_gave(cluster, client) -> None:
    asked = await client.responses.create(**ASK)
    outputs = [
        {"type": "function_call_output", "call_id": item.call_id, "output": f"gave {item.name}"}
        for item in asked.output
        if item.type == "function_call"
    ]
    await client.responses.create(model=MODEL, input=outputs, tools=TOOLS, previous_response_id=asked.id)
    by_id = prompt_of(cluster)
    repeated = [{"role": "user", "content": ASK["input"]}, *asked.output, *outputs]
    await client.responses.create(model=MODEL, input=repeated, tools=TOOLS)
    assert prompt_of(cluster) == by_id
    parts = ["Let me see.", '"name": "get_weather"', '"name": "now"', "gave get_weather", "gave now"]
    places = [by_id.rfind(part) for part in parts]
    assert places == sorted(places)
    assert -1 not in places


async def test_the_prompt_is_that_of_the_same_chat(cluster, client) -> None:
    await client.responses.create(**ASK)
    asked = prompt_of(cluster)
    tools = [
        {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        for tool in TOOLS
    ]
    messages = [{"role": "user", "content": ASK["input"]}]
    await client.chat.completions.create(model=MODEL, messages=messages, tools=tools)
    assert prompt_of(cluster) == asked


@pytest.mark.parametrize("choice", ["none", "auto", "required", {"type": "function", "name": "now"}])
async def test_the_choice_of_tools_is_the_chat_s(cluster, client, choice) -> None:
    answered = await client.responses.create(**ASK, tool_choice=choice)
    grammar = cluster.workers.calls[-1].sequence.sampling.grammar
    assert bool(grammar) == (choice not in ("none", "auto"))
    assert bool(calls_of(answered)) == (choice != "none")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        (
            {"tools": [{"type": "function", "name": "a", "parameters": {"type": "string"}}]},
            "tools[0].parameters",
        ),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
    ],
    ids=str,
)
async def test_what_the_chat_refuses_is_refused_by_the_name_it_has_here(cluster, change, param) -> None:
    answered = await cluster.http.post("/v1/responses", json=ASK | change)
    assert (answered.status_code, answered.json()["error"]["param"]) == (400, param)


async def test_without_tools_the_text_is_the_answer(start_cluster) -> None:
    cluster = await start_cluster()
    answered = await cluster.http.post("/v1/responses", json={"model": MODEL, "input": "a", "tools": []})
    assert answered.json()["output"][0]["content"][0]["text"] == ANSWER
