"""Answers as the families of models write them, and what is in them: content and calls."""

from typing import NamedTuple

from services.gateway.text.tool_calls.hermes import HermesFormat
from services.gateway.text.tool_calls.llama_json import LlamaJsonFormat
from services.gateway.text.tool_calls.mistral import MistralFormat
from services.gateway.text.tool_calls.piece import ToolFormat
from services.gateway.text.tool_calls.pythonic import PythonicFormat

NAMES = {"get_weather", "add-numbers", "now"}


class Recorded(NamedTuple):
    format: ToolFormat
    text: str
    content: str
    calls: list[tuple[str, str]]  # name, and arguments character by character


HERMES, LLAMA, PYTHONIC, MISTRAL = HermesFormat(), LlamaJsonFormat(), PythonicFormat(), MistralFormat()
WEATHER = '{"city": "Paris", "unit": "C"}'
TRICKY = r'{"city": "a \"}]{[ \\", "deep": {"list": [1, {"x": "</tool_call>"}], "é": "日本 👍"}}'

CALLS = {
    "hermes: one": Recorded(
        HERMES,
        f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>',
        "",
        [("get_weather", WEATHER)],
    ),
    "hermes: words before, two calls": Recorded(
        HERMES,
        f'Let me see.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {TRICKY}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Let me see.",
        [("get_weather", TRICKY), ("now", "{}")],
    ),
    "hermes: words after": Recorded(
        HERMES,
        '<tool_call>{"name": "now", "arguments": {}}</tool_call> That is all. ',
        "That is all.",
        [("now", "{}")],
    ),
    "hermes: keys the other way round": Recorded(
        HERMES,
        '<tool_call>{"arguments": {"a": "é"}, "name": "now"}</tool_call>',
        "",
        [("now", '{"a": "é"}')],
    ),
    "hermes: quoted arguments, further keys": Recorded(
        HERMES,
        r'<tool_call>{"name": "now", "id": 3, "arguments": "{\"a\": 1}"}</tool_call>'
        '<tool_call>{"name": "now", "arguments": {"b": 2}, "id": "}"}</tool_call>',
        "",
        [("now", '{"a": 1}'), ("now", '{"b": 2}')],
    ),
    "hermes: no arguments": Recorded(
        HERMES, '<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]
    ),
    "hermes: the end marker is missing": Recorded(
        HERMES,
        f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}',
        "",
        [("get_weather", WEATHER)],
    ),
    "hermes: the last brace is missing": Recorded(
        HERMES,
        f'<tool_call>{{"name": "get_weather", "arguments": {WEATHER}\n</tool_call> Done.',
        "Done.",
        [("get_weather", WEATHER)],
    ),
    "hermes: ends within the arguments": Recorded(
        HERMES,
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Par',
        "",
        [("get_weather", '{"city": "Par')],
    ),
    "llama: one": Recorded(
        LLAMA,
        f'{{"name": "get_weather", "parameters": {WEATHER}}}',
        "",
        [("get_weather", WEATHER)],
    ),
    "llama: with type, several": Recorded(
        LLAMA,
        f'\n{{"type": "function", "name": "get_weather", "parameters": {TRICKY}}}; '
        '{"name": "now", "parameters": {}}\n{"name": "now", "arguments": {"a": 1}}',
        "",
        [("get_weather", TRICKY), ("now", "{}"), ("now", '{"a": 1}')],
    ),
    "llama: behind the tag": Recorded(
        LLAMA,
        f'I call it.<|python_tag|>{{"name": "get_weather", "parameters": {WEATHER}}}',
        "I call it.",
        [("get_weather", WEATHER)],
    ),
    "llama: words after": Recorded(
        LLAMA,
        '{"name": "now", "parameters": {}} and so on',
        "and so on",
        [("now", "{}")],
    ),
    "pythonic: two": Recorded(
        PYTHONIC,
        """[get_weather(city="a ' ]) b", unit='it\\'s "C"', n=-1.5e3, """
        """deep={"a": [True, None, false]}), now()]""",
        "",
        [
            (
                "get_weather",
                '{"city": "a \' ]) b", "unit": "it\'s \\"C\\"", "n": -1500.0, '
                '"deep": {"a": [true, null, false]}}',
            ),
            ("now", "{}"),
        ],
    ),
    "pythonic: in its marks": Recorded(
        PYTHONIC,
        '<|python_start|>[ add-numbers( a = 1 , b = (2, [3]) ) ]<|python_end|>',
        "",
        [("add-numbers", '{"a": 1, "b": [2, [3]]}')],
    ),
    "pythonic: words after": Recorded(PYTHONIC, "[now()] Done.", "Done.", [("now", "{}")]),
    "mistral: a list": Recorded(
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {TRICKY}}}, '
        '{"name": "now", "arguments": {}, "id": "abcdefghi"}]',
        "",
        [("get_weather", TRICKY), ("now", "{}")],
    ),
    "mistral: an object": Recorded(
        MISTRAL, '[TOOL_CALLS]{"name": "now", "arguments": {}}', "", [("now", "{}")]
    ),
    "mistral: names": Recorded(
        MISTRAL,
        f'Well.[TOOL_CALLS]get_weather[ARGS]{TRICKY}[TOOL_CALLS]now[CALL_ID]a1B2c3D4e[ARGS]{{}}',
        "Well.",
        [("get_weather", TRICKY), ("now", "{}")],
    ),
    "hermes: cut off within the end marker": Recorded(
        HERMES, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_ca', "", [("now", "{}")]
    ),
    "mistral: a name without its mark": Recorded(
        MISTRAL, '[TOOL_CALLS] add-numbers{"a": 1}', "", [("add-numbers", '{"a": 1}')]
    ),
}  # fmt: skip

# Nothing in these is a call, so every character is content.
NO_CALLS = {
    "hermes: plain": (HERMES, " Just text, a < b, <tool> and {braces}.\n"),
    "hermes: half a marker": (HERMES, "see <tool_call"),
    "hermes: only a marker": (HERMES, "see <tool_call>\n "),
    "hermes: no JSON": (HERMES, "<tool_call>now()</tool_call>\n"),
    "hermes: bad JSON": (HERMES, '<tool_call>{"name": now, "arguments": {}}</tool_call>'),
    "hermes: unknown name": (HERMES, '<tool_call>{"name": "rm", "arguments": {"a": {}}}</tool_call> ok'),
    "hermes: arguments that are none": (HERMES, '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    "hermes: an end within the head": (HERMES, '<tool_call>\n{"name": "no'),
    "hermes: deep": (HERMES, '<tool_call>{"name": "now", "x": ' + "[" * 3000 + "]" * 3000 + "}"),
    "llama: plain": (LLAMA, "The sum is {x}; done"),
    "llama: another object": (LLAMA, '{"answer": 42, "name": "x"} indeed'),
    "llama: an object further on": (LLAMA, 'So: {"name": "now", "parameters": {}}'),
    "llama: its own tools": (LLAMA, '<|python_tag|>brave_search.call(query="x")'),
    "llama: nothing behind the tag": (LLAMA, "a <|python_tag|>"),
    "llama: unfinished": (LLAMA, ' \n{"name": '),
    "pythonic: plain": (PYTHONIC, "Not [now()]"),
    "pythonic: a list": (PYTHONIC, "[1, 2, 3]"),
    "pythonic: an unknown name": (PYTHONIC, '[rm(path="/")]'),
    "pythonic: positional": (PYTHONIC, "[now(1)]"),
    "pythonic: code": (PYTHONIC, "[now(a=open('x').read())]"),
    "pythonic: unfinished": (PYTHONIC, '  <|python_start|>[now(a="'),
    "pythonic: deep": (PYTHONIC, "[now(a=" + "[" * 3000 + "]" * 3000 + ")]"),
    "pythonic: a huge number": (PYTHONIC, "[now(a=" + "9" * 10_000 + ")]"),
    "mistral: plain": (MISTRAL, "[TOOL_] calls [TOOL_CALLS"),
    "mistral: no name": (MISTRAL, "[TOOL_CALLS] what {now}"),
    "mistral: unknown name": (MISTRAL, '[TOOL_CALLS]rm[ARGS]{"path": "/"}'),
    "mistral: long": (MISTRAL, "[TOOL_CALLS]" + "word " * 100 + "{}"),
    "mistral: empty list": (MISTRAL, "[TOOL_CALLS] []"),
    "mistral: bad list": (MISTRAL, '[TOOL_CALLS] [{"name": 1}]'),
}
