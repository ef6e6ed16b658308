"""The Responses API over the request path of a chat, through OpenAI's own client."""

import json

import openai
import pytest
from pydantic import BaseModel

from services.core.errors import ModelFileError
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL

ASK = {"model": MODEL, "input": "What is the capital of France?"}
HALF = "\ud800"  # of a surrogate pair
DEPTH = 260
DEEP = json.loads("[" * DEPTH + "]" * DEPTH)
TOOL = {"type": "function", "name": "f"}
TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def client_of(cluster, key: str = "mine") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
async def client(cluster):
    async with client_of(cluster) as client:
        yield client


def chat_text(cluster, tokenizer, call: int = -1) -> str:
    """The prompt that a worker got."""
    prompt = cluster.workers.calls[call].sequence.prompt_ids
    return tokenizer.decode(prompt, skip_special_tokens=False)


async def test_a_whole_answer(cluster, client, tokenizer) -> None:
    response = await client.responses.create(**ASK, instructions="Be brief.", metadata={"a": "b"})
    assert (response.output_text, response.status, response.error) == (ANSWER, "completed", None)
    [message] = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert response.usage.output_tokens == len(cluster.answer_ids)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.input_tokens_details.cached_tokens == 0
    assert (response.instructions, response.metadata, response.store) == ("Be brief.", {"a": "b"}, True)
    prompt = chat_text(cluster, tokenizer)
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is" in prompt


async def test_a_streamed_answer_is_the_typed_events_in_order(cluster, client) -> None:
    stream = await client.responses.create(**ASK, stream=True)
    events = [event async for event in stream]
    types = [event.type for event in events]
    assert list(dict.fromkeys(types)) == TEXT_EVENTS
    assert types.count("response.output_text.delta") > 3
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == ANSWER
    begun, final = events[0].response, events[-1].response
    assert (begun.status, begun.output, begun.usage) == ("in_progress", [], None)
    assert (final.id, final.output_text, final.status) == (begun.id, ANSWER, "completed")
    assert {event.item_id for event in deltas} == {final.output[0].id}


async def test_the_client_s_streaming_helper_builds_the_same_response(client) -> None:
    async with client.responses.stream(**ASK, temperature=0) as stream:
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(texts) == final.output_text == ANSWER


async def test_an_answer_that_its_limit_cut_short_is_incomplete(client) -> None:
    whole = await client.responses.create(**ASK, max_output_tokens=5)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (whole.output[0].status, whole.usage.output_tokens) == ("incomplete", 5)
    events = [event async for event in await client.responses.create(**ASK, max_output_tokens=5, stream=True)]
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.incomplete_details.reason == "max_output_tokens"


async def test_an_answer_without_any_text_is_an_empty_message(start_cluster, tokenizer) -> None:
    cluster = await start_cluster(answer="")
    async with client_of(cluster) as client:
        assert (await client.responses.create(**ASK)).output[0].content[0].text == ""
        events = [event.type async for event in await client.responses.create(**ASK, stream=True)]
    assert events == [name for name in TEXT_EVENTS if name != "response.output_text.delta"]


async def test_items_are_the_messages_of_a_chat(cluster, client, tokenizer) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Hello", "annotations": []}]},
        {"role": "user", "content": "France?"},
    ]
    await client.responses.create(model=MODEL, input=items)
    asked = chat_text(cluster, tokenizer)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "France?"},
    ]
    await client.chat.completions.create(model=MODEL, messages=messages)
    assert asked == chat_text(cluster, tokenizer)


class TestConversations:
    async def test_a_request_goes_on_from_an_answer(self, cluster, client, tokenizer) -> None:
        first = await client.responses.create(**ASK, instructions="Be brief.")
        second = await client.responses.create(
            model=MODEL, input="And of Japan?", previous_response_id=first.id
        )
        third = await client.responses.create(model=MODEL, input="Thanks.", previous_response_id=second.id)
        text = chat_text(cluster, tokenizer)
        said = ["What is the capital", ANSWER, "And of Japan?", ANSWER, "Thanks."]
        places = [text.find(part) for part in said[:2]] + [text.rfind(part) for part in said[2:]]
        assert places == sorted(places)
        assert -1 not in places
        assert "Be brief." not in text, "instructions are of one request"
        assert third.previous_response_id == second.id

    async def test_a_streamed_answer_is_kept_too(self, client) -> None:
        events = [event async for event in await client.responses.create(**ASK, stream=True)]
        final = events[-1].response
        assert await client.responses.retrieve(final.id) == final

    async def test_answers_can_be_read_and_deleted(self, client) -> None:
        made = await client.responses.create(**ASK)
        assert await client.responses.retrieve(made.id) == made
        await client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.delete(made.id)

    async def test_they_belong_to_their_key(self, cluster, client) -> None:
        made = await client.responses.create(**ASK)
        async with client_of(cluster, "another") as other:
            for asking in (other.responses.retrieve(made.id), other.responses.delete(made.id)):
                with pytest.raises(openai.NotFoundError):
                    await asking
            with pytest.raises(openai.BadRequestError) as refused:
                await other.responses.create(**ASK, previous_response_id=made.id)
        assert refused.value.param == "previous_response_id"
        assert refused.value.code == "previous_response_not_found"
        assert await client.responses.retrieve(made.id) == made

    async def test_what_is_not_to_be_stored_is_not(self, cluster, client) -> None:
        made = await client.responses.create(**ASK, store=False)
        assert made.store is False
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)

    async def test_what_is_too_large_is_answered_and_not_kept(self, start_cluster, caplog) -> None:
        cluster = await start_cluster(responses_bytes_max=100)
        async with client_of(cluster) as client:
            made = await client.responses.create(**ASK)
            assert (made.output_text, made.store) == (ANSWER, False)
            assert made.id in caplog.text
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(made.id)

    async def test_while_redis_is_away_only_conversations_have_to_wait(self, cluster, client, caplog) -> None:
        first = await client.responses.create(**ASK)
        cluster.history.available = False
        made = await client.responses.create(**ASK)
        assert (made.output_text, made.store) == (ANSWER, False)
        assert "is not kept" in caplog.text
        for asking in (
            client.responses.create(**ASK, previous_response_id=first.id),
            client.responses.retrieve(first.id),
        ):
            with pytest.raises(openai.InternalServerError) as failed:
                await asking
            assert failed.value.status_code == 503
            assert "send the whole conversation" in failed.value.message
        cluster.history.available = True
        assert (await client.responses.create(**ASK, previous_response_id=first.id)).store

    @pytest.mark.parametrize("response_id", ["resp_1", "resp_" + "0" * 32, "x" * 5000, "resp_%00"])
    async def test_an_unknown_id_is_a_404(self, cluster, response_id) -> None:
        for method in ("GET", "DELETE"):
            answered = await cluster.http.request(method, f"/v1/responses/{response_id}")
            assert answered.status_code == 404
            assert answered.json()["error"]["param"] == "response_id"


class Person(BaseModel):
    name: str
    age: int


class TestFormats:
    async def test_a_schema_is_that_of_a_chat_and_the_client_parses_the_answer(self, start_cluster) -> None:
        cluster = await start_cluster(answer='{"name": "Ada", "age": 36}')
        async with client_of(cluster) as client:
            response = await client.responses.parse(**ASK, text_format=Person)
            assert response.output_parsed == Person(name="Ada", age=36)
            messages = [{"role": "user", "content": ASK["input"]}]
            await client.chat.completions.parse(model=MODEL, messages=messages, response_format=Person)
        grammars = {call.sequence.sampling.grammar for call in cluster.workers.calls}
        assert len(grammars) == 1
        assert grammars.pop()

    async def test_a_schema_that_nobody_can_follow_is_refused_by_its_name(self, cluster) -> None:
        form = {"type": "json_schema", "name": "a", "schema": {"type": "banana"}}
        answered = await cluster.http.post("/v1/responses", json=ASK | {"text": {"format": form}})
        assert answered.status_code == 400
        assert answered.json()["error"]["param"].startswith("text.format")


class TestFailures:
    async def test_before_the_first_event_it_is_an_http_error(self, cluster, client) -> None:
        cluster.workers.script(ANY_WORKER, "prefill", Fault(ModelFileError("no")))
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(**ASK, stream=True)
        assert cluster.metric("requests_total", endpoint="responses", outcome="model_file") == 1

    async def test_in_a_stream_it_is_the_last_event(self, cluster, client) -> None:
        cluster.workers.script(ANY_WORKER, "decode", Fault(ModelFileError("no"), after_tokens=3))
        events = [event async for event in await client.responses.create(**ASK, stream=True)]
        failed = events[-1]
        assert failed.type == "response.failed"
        assert (failed.response.status, failed.response.error.code) == ("failed", "server_error")
        assert [event.sequence_number for event in events] == list(range(len(events)))
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(failed.response.id)


BAD = [
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": "a"}, {"role": "user", "content": 5}]}, "input[1].content"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
    ),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"role": "user", "content": "a"}] * 2049}, "input"),
    ({"input": "word " * 9000}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": "x"}, "top_p"),
    ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ({"metadata": {"a": 5}}, "metadata.a"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ({"reasoning": {"effort": "low"}}, "reasoning"),
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["reasoning.encrypted_content"]}, "include"),
    ({"max_tool_calls": 5}, "max_tool_calls"),
    ({"prompt": {"id": "a"}}, "prompt"),
    ({"service_tier": 5}, "service_tier"),
]


@pytest.mark.parametrize("network", [False])
class TestBadInput:
    @pytest.mark.parametrize(("change", "param"), BAD, ids=str)
    async def test_a_bad_request_names_its_parameter(self, cluster, change, param) -> None:
        answered = await cluster.http.post("/v1/responses", json=ASK | change)
        assert (answered.status_code, answered.json()["error"]["param"]) == (400, param)
        assert cluster.workers.calls == []

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"user": HALF}, "user"),
            ({"input": [{"role": "user", "content": "a", "id": HALF}]}, "input"),
            ({"input": [{"role": "user", "content": "a", "mood": DEEP}]}, "input"),
            ({"text": {"format": {"type": "text", "mood": HALF}}}, "text"),
            ({"tools": [{**TOOL, "parameters": {"title": HALF}}], "tool_choice": "none"}, "tools"),
            ({"tools": [{**TOOL, "parameters": {"title": DEEP}}], "tool_choice": "none"}, "tools"),
            (
                {"tools": [TOOL], "tool_choice": {"type": "function", "name": "f", "mood": HALF}},
                "tool_choice",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_what_could_not_be_given_back_is_refused(self, cluster, change, param, stream) -> None:
        body = json.dumps(ASK | change | {"stream": stream})  # in ASCII
        headers = {"Content-Type": "application/json"}
        answered = await cluster.http.post("/v1/responses", content=body, headers=headers)
        assert (answered.status_code, answered.json()["error"]["param"]) == (400, param), answered.text
        assert cluster.workers.calls == []

    async def test_what_is_nested_as_deeply_as_allowed_can_be_gone_on_from(self, cluster) -> None:
        for depth in range(DEPTH, 0, -1):
            item = {"role": "user", "content": "a", "mood": json.loads("[" * depth + "]" * depth)}
            first = await cluster.http.post("/v1/responses", json=ASK | {"input": [item]})
            if first.status_code == 200:
                break
        assert depth < DEPTH
        again = ASK | {"previous_response_id": first.json()["id"]}
        assert (await cluster.http.post("/v1/responses", json=again)).status_code == 200

    async def test_an_unknown_model_is_a_404(self, cluster) -> None:
        answered = await cluster.http.post("/v1/responses", json=ASK | {"model": "other"})
        assert answered.status_code == 404

    async def test_values_that_ask_for_nothing_special_are_accepted(self, cluster) -> None:
        nothing = {
            "background": False,
            "truncation": "disabled",
            "include": [],
            "reasoning": {},
            "tools": [],
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "prompt_cache_key": "a",
            "stream_options": {"include_obfuscation": False},
            "tool_choice": "auto",
            "user": "me",
        }
        answered = await cluster.http.post("/v1/responses", json=ASK | nothing)
        assert answered.status_code == 200, answered.text

    async def test_a_strict_gateway_refuses_unknown_fields(self, start_cluster) -> None:
        cluster = await start_cluster(strict=True)
        for change, param in [
            ({"brand_new": 1}, "brand_new"),
            ({"input": [{"role": "user", "content": "a", "mood": 1}]}, "input[0].mood"),
        ]:
            answered = await cluster.http.post("/v1/responses", json=ASK | change)
            assert (answered.status_code, answered.json()["error"]["param"]) == (400, param)
