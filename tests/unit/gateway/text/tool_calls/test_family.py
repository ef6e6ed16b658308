"""Which format a model has is seen in its chat template."""

import pytest

from services.gateway.text.tool_calls.family import FORMATS, family_of
from services.gateway.text.tool_calls.hermes import HermesFormat
from services.gateway.text.tool_calls.llama_json import LlamaJsonFormat
from services.gateway.text.tool_calls.mistral import MistralFormat
from services.gateway.text.tool_calls.pythonic import PythonicFormat
from services.model.chat_template import ChatTemplate

# What is particular in the templates of the families.
QWEN = "{% if tools %}<tools>{{ tools | tojson }}</tools>within <tool_call></tool_call> XML tags{% endif %}"
QWEN_CODER = "{% if tools %}<tool_call>\n<function=example_function_name>\n<parameter=x>{% endif %}"
LLAMA = """{% if tools %}Respond in the format {"name": function name, "parameters": dictionary}
{{ tools }}{% if builtin_tools %}<|python_tag|>{% endif %}{% endif %}"""
LLAMA_PYTHONIC = "{% if tools %}[func_name1(params_name1=params_value1), func_name2(params)]{% endif %}"
LLAMA_4 = "{% if tools %}<|python_start|>{{ tools }}<|python_end|>{% endif %}"
MISTRAL = "{% if tools %}[AVAILABLE_TOOLS]{{ tools }}{% endif %}[TOOL_CALLS][{{ calls }}]"
MISTRAL_3 = "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}"
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
OTHER = "{% if tools %}<｜tool▁calls▁begin｜>{{ tools }}{% endif %}"

SEEN = {
    "qwen": (QWEN, HermesFormat, False),
    "qwen's coder, which writes XML": (QWEN_CODER, HermesFormat, True),
    "llama": (LLAMA, LlamaJsonFormat, False),
    "llama 3.2": (LLAMA_PYTHONIC, PythonicFormat, False),
    "llama 4": (LLAMA_4, PythonicFormat, False),
    "mistral": (MISTRAL, MistralFormat, False),
    "mistral 3": (MISTRAL_3, MistralFormat, False),
    "no tools": (PLAIN, HermesFormat, True),
    "a format that is not read here": (OTHER, HermesFormat, True),
}


@pytest.mark.parametrize(("source", "kind", "plain"), SEEN.values(), ids=SEEN)
def test_the_format_is_seen(source, kind, plain) -> None:
    family = family_of(ChatTemplate({"default": source}, {}))
    assert (type(family.format), family.plain) == (kind, plain)


def test_the_template_for_tools_is_the_one_that_tells() -> None:
    family = family_of(ChatTemplate({"default": PLAIN, "tool_use": QWEN}, {}))
    assert not family.plain


def test_a_model_without_a_template_has_some_format_too() -> None:
    assert family_of(ChatTemplate({}, {})).plain


@pytest.mark.parametrize("name", FORMATS)
def test_the_operator_knows_better(name) -> None:
    family = family_of(ChatTemplate({"default": OTHER}, {}), name)
    assert (type(family.format), family.plain) == (type(FORMATS[name]), False)


def test_mistral_writes_calls_in_the_way_of_its_template() -> None:
    assert family_of(ChatTemplate({"default": MISTRAL_3}, {})).format._named
    assert not family_of(ChatTemplate({"default": MISTRAL}, {})).format._named
