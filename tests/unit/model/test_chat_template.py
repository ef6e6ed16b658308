import re
from datetime import datetime

import pytest

from services.core.errors import BadRequest
from services.model.chat_template import Chat, ChatTemplate

MESSAGES = [
    {"role": "system", "content": "Be <kind> & brief."},
    {"role": "user", "content": "Wie geht's? 😀"},
    {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"b": 1, "a": "<x>"}}]},
    {"role": "tool", "content": "4"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TEMPLATES = {
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "a special token that is not set": "[{{ unk_token }}]{% if unk_token is defined %}set{% endif %}",
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}"
    "{{ messages[2] | tojson(sort_keys=true) }}",
    "absent tools and documents": "{% if tools is none and documents is none %}none{% else %}some{% endif %}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{% if m.role == 'tool' %}{% break %}{% endif %}{{ m.role }} {% endfor %}",
    "trimmed blocks": "  {% if true %}\n    a\n  {% endif %}\nb\n",
    "namespaces": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "generation blocks": "{% for m in messages %}"
    "{% generation %}<{{ m.role }}>{% endgeneration %}{% endfor %}",
    "macros and filters": "{% macro f(m) %}{{ m.role | upper | trim }}{% endmacro %}{{ f(messages[1]) }}",
    "the generation prompt": "{{ messages[0].role }}{% if add_generation_prompt %}<assistant>{% endif %}",
    "extra variables": "{{ 'thinking' if enable_thinking else 'quiet' }}",
}


KNOWS_TOOLS = "{# tools #}"  # so that messages with tool calls reach the template as they are


def _render(source: str, tools=None, messages=None, **variables) -> str:
    template = ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    messages = messages or MESSAGES
    return template.render(Chat(messages=messages, tools=tools, variables=variables))


@pytest.fixture(scope="module")
def reference():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["without tools", "with tools"])
def test_every_feature_of_the_dialect_renders_as_in_transformers(reference, source, tools):
    source = KNOWS_TOOLS + source
    expected = reference.apply_chat_template(
        MESSAGES,
        tools,
        chat_template=source,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    assert _render(source, tools=tools, enable_thinking=True) == expected


def test_the_template_can_ask_for_the_date():
    assert re.fullmatch(r"\d{4}", _render("{{ strftime_now('%Y') }}"))
    assert _render("{{ strftime_now('%Y') }}") in (str(datetime.now().year), str(datetime.now().year - 1))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{# tools #}{{ messages[2].tool_calls + '!' }}", "can only concatenate list"),
        ("{{ messages[9].content.text }}", "has no element 9"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_what_a_template_refuses_is_an_error_of_the_messages(source, reason):
    with pytest.raises(BadRequest) as caught:
        _render(source)
    assert caught.value.param == "messages"
    assert reason in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(BadRequest):
        _render(source)


def test_a_model_without_a_template_points_to_completions():
    with pytest.raises(BadRequest, match="/v1/completions") as caught:
        ChatTemplate({}, {}).render(Chat(messages=MESSAGES))
    assert caught.value.param == "messages"


def test_the_tool_use_template_serves_requests_with_tools_only():
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render(Chat(messages=MESSAGES, tools=TOOLS)) == "tools"
    assert template.render(Chat(messages=MESSAGES)) == "plain"


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CONVERSATION = [
    {"role": "user", "content": "What is f of 1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
    {"role": "tool", "content": "3", "tool_call_id": "c1"},
]
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def test_a_template_gets_the_arguments_of_calls_as_objects():
    source = "{# tools #}{% for c in messages[1].tool_calls %}{{ c.function.arguments.a + 1 }}{% endfor %}"
    assert _render(source, messages=CONVERSATION) == "22"


@pytest.mark.parametrize("arguments", ["not JSON", "[1]", '"text"'])
def test_arguments_that_a_model_wrote_badly_stay_what_they_are(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    source = "{# tools #}{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert _render(source, messages=messages) in (arguments, f'"{arguments}"')


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_a_template_without_tools_gets_them_as_text_of_its_three_roles(system):
    text = _render(CHATML, tools=TOOLS, messages=[*system, *CONVERSATION])
    begin = "<system>Be brief.\n\n# Tools" if system else "<system># Tools"
    assert text.startswith(begin)
    assert '<tools>\n{"type": "function", "function": {"name": "f"' in text
    assert text.endswith(
        "<user>What is f of 1?\n"
        '<assistant><tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        "<user><tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>\n"
    )


def test_past_calls_are_written_even_where_no_tools_are_given_any_more():
    text = _render(CHATML, messages=CONVERSATION)
    assert "<system>" not in text
    assert "<tool_call>" in text
    assert "<tool_response>" in text


CONTINUED = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Paris is  "}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}",
    ],
    ids=["keeps blanks", "trims"],
)
def test_a_final_message_is_left_open_as_in_transformers(reference, source):
    template = ChatTemplate({"default": source}, {})
    rendered = template.render(
        Chat(messages=CONTINUED, add_generation_prompt=False, continue_final_message=True)
    )
    assert rendered == reference.apply_chat_template(
        CONTINUED, chat_template=source, tokenize=False, continue_final_message=True
    )


def test_a_final_message_that_the_template_leaves_out_cannot_be_continued():
    chat = Chat(messages=CONTINUED, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(BadRequest) as refused:
        ChatTemplate({"default": "{{ messages[0].content }}"}, {}).render(chat)
    assert refused.value.param == "continue_final_message"


def test_documents_reach_templates_that_know_them_and_are_refused_for_others():
    documents = [{"title": "T", "text": "x"}]
    chat = Chat(messages=CONTINUED, documents=documents)
    knowing = ChatTemplate({"default": "{% for d in documents %}{{ d.title }}{% endfor %}"}, {})
    assert knowing.render(chat) == "T"
    with pytest.raises(BadRequest) as refused:
        ChatTemplate({"default": CHATML}, {}).render(chat)
    assert refused.value.param == "documents"


def test_a_text_that_becomes_too_long_is_refused_while_it_grows():
    chat = Chat(messages=CONTINUED, characters_max=1000)
    endless = "{% for i in range(90000) %}{% for j in range(90000) %}{{ m }}word{% endfor %}{% endfor %}"
    with pytest.raises(BadRequest) as refused:
        ChatTemplate({"default": endless}, {}).render(chat)
    assert refused.value.code == "context_length_exceeded"


def test_a_client_s_template_is_rendered_instead_and_blamed_for_its_errors():
    template = ChatTemplate({"default": CHATML}, {"bos_token": "<s>"})
    assert template.render(Chat(messages=CONTINUED, template="{{ bos_token }}mine")) == "<s>mine"
    with pytest.raises(BadRequest) as refused:
        template.render(Chat(messages=CONTINUED, template="{{ raise_exception('no') }}"))
    assert refused.value.param == "chat_template"


def test_of_clients_templates_only_the_latest_stay_compiled():
    template = ChatTemplate({"default": CHATML}, {})
    for n in range(100):
        assert template.render(Chat(messages=CONTINUED, template=f"{n}")) == str(n)
    template.render(Chat(messages=CONTINUED))
    assert len(template._compiled) <= 9
