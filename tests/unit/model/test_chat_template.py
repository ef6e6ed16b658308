import re
from datetime import datetime

import pytest

from services.core.errors import BadRequest
from services.model.chat_template import ChatTemplate

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


def _render(source: str, **variables) -> str:
    template = ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(MESSAGES, add_generation_prompt=True, variables=variables)


@pytest.fixture(scope="module")
def reference():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["without tools", "with tools"])
def test_every_feature_of_the_dialect_renders_as_in_transformers(reference, source, tools):
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
        ("{{ messages[2].tool_calls + '!' }}", "can only concatenate list"),
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
        ChatTemplate({}, {}).render(MESSAGES, add_generation_prompt=True, variables={})
    assert caught.value.param == "messages"


def test_the_tool_use_template_serves_requests_with_tools_only():
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {})
    assert template.render(MESSAGES, add_generation_prompt=True, variables={"tools": TOOLS}) == "tools"
    assert template.render(MESSAGES, add_generation_prompt=True, variables={"tools": None}) == "plain"
