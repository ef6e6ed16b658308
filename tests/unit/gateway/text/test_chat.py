"""What of a chat request reaches its template, and which of its tools may be called."""

import pytest

from services.core.errors import BadRequest
from services.gateway.api.schema import ChatCompletionRequest
from services.gateway.text.chat import ChatReader
from services.gateway.text.tool_calls.family import FORMATS, ToolFamily
from services.model.chat_template import Chat

HELLO = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


def tool(name: str, **function) -> dict:
    return {"type": "function", "function": {"name": name, **function}}


class Recording:
    """A renderer that only keeps what it is to render."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def render(self, chat: Chat) -> str:
        self.chat = chat
        return ""


@pytest.fixture
def reader() -> ChatReader:
    return ChatReader(Recording(), ToolFamily(FORMATS["hermes"], plain=False))


def request(*messages: dict, **fields) -> ChatCompletionRequest:
    body = {"model": "m", "messages": list(messages) or [HELLO], **fields}
    return ChatCompletionRequest.model_validate(body)


async def chat_of(reader: ChatReader, asked: ChatCompletionRequest) -> Chat:
    await reader.text(asked, 1000)
    return reader.renderer.chat


async def test_messages_reach_the_template_as_it_knows_them(reader) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat = await chat_of(
        reader,
        request(
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts, "name": "Ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "c"},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"role": "assistant", "refusal": "Never."},
        ),
    )
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "c"},
        {"role": "assistant", "content": "No."},
        {"role": "assistant", "content": "Never."},
    ]


async def test_tools_are_shown_as_models_are_trained_with_them(reader) -> None:
    tools = [tool("f", strict=True, parameters=SCHEMA, description="adds"), tool("g")]
    chat = await chat_of(reader, request(tools=tools))
    assert chat.tools == [
        {"type": "function", "function": {"name": "f", "description": "adds", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": {}}}},
    ]
    assert (await chat_of(reader, request(tools=tools, tool_choice="none"))).tools is None


@pytest.mark.parametrize(
    ("fields", "opens", "continues"),
    [
        ({}, True, False),
        ({"add_generation_prompt": False}, False, False),
        ({"continue_final_message": True}, False, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, False, True),
        ({"continue_final_message": False, "add_generation_prompt": True}, True, False),
    ],
)
async def test_a_prompt_opens_an_answer_or_leaves_the_last_message_open(
    reader, fields, opens, continues
) -> None:
    chat = await chat_of(reader, request(**fields))
    assert (chat.add_generation_prompt, chat.continue_final_message) == (opens, continues)


async def test_variables_and_the_effort_reach_the_template(reader) -> None:
    asked = request(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert (await chat_of(reader, asked)).variables == {"enable_thinking": False, "reasoning_effort": "low"}


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"]
)
async def test_variables_cannot_replace_what_has_a_parameter_of_its_own(reader, name) -> None:
    with pytest.raises(BadRequest) as refused:
        await chat_of(reader, request(chat_template_kwargs={name: []}))
    assert refused.value.param == "chat_template_kwargs"


async def test_a_client_s_template_is_taken_only_where_it_is_trusted(reader) -> None:
    asked = request(chat_template="mine")
    with pytest.raises(BadRequest) as refused:
        await chat_of(reader, asked)
    assert refused.value.param == "chat_template"
    trusting = ChatReader(Recording(), reader.family, trusts_templates=True)
    assert (await chat_of(trusting, asked)).template == "mine"


NAMED = {"type": "function", "function": {"name": "g"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("choice", "kind", "names"),
    [
        (None, "auto", ["f", "g"]),
        ("auto", "auto", ["f", "g"]),
        ("required", "required", ["f", "g"]),
        (NAMED, "named", ["g"]),
        (ALLOWED, "required", ["g"]),
    ],
)
def test_the_choice_says_which_tools_may_be_called(reader, choice, kind, names) -> None:
    use = reader.tool_use(request(tools=[tool("f"), tool("g")], tool_choice=choice))
    assert (use.choice, [each.name for each in use.tools]) == (kind, names)


def test_no_tool_may_be_called_where_none_is_offered_or_wanted(reader) -> None:
    assert reader.tool_use(request()) is None
    assert reader.tool_use(request(tool_choice="auto")) is None
    assert reader.tool_use(request(tools=[tool("f")], tool_choice="none")) is None


@pytest.mark.parametrize(
    ("parameters", "forced"),
    [
        (None, {"type": "object", "additionalProperties": False, "properties": {}}),
        (SCHEMA, {**SCHEMA, "additionalProperties": False}),
        ({**SCHEMA, "additionalProperties": True}, {**SCHEMA, "additionalProperties": True}),
        ({}, {"type": "object"}),
    ],
)
def test_forced_arguments_are_those_that_the_schema_speaks_of(reader, parameters, forced) -> None:
    use = reader.tool_use(request(tools=[tool("f", parameters=parameters)]))
    assert use.tools[0].parameters == forced
