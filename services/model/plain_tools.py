"""Tools for chat templates that know nothing of them, in the words of Hermes.

Definitions become part of the system message, calls part of the assistant's text, results the user's:
messages of these three roles with plain text are what every template can write. A model that was never
trained for tools still reads what it may call, and writes calls as a parser of Hermes' format finds them.
"""

import json
from typing import Any

_INTRODUCTION = (
    "# Tools\n\n"
    "You may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    "<tools>\n{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def with_plain_tools(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain: list[dict[str, Any]] = []
    for message in messages:
        written = _plain(message)
        if message.get("role") == "tool" and plain and plain[-1].get("results"):
            plain[-1]["content"] += "\n" + written["content"]  # one turn of the user's, as calls are one
        else:
            plain.append(written)
    for message in plain:
        message.pop("results", None)
    return _introduced(plain, tools) if tools else plain


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    match message:
        case {"role": "tool"}:
            content = f"<tool_response>\n{message.get('content', '')}\n</tool_response>"
            return {"role": "user", "content": content, "results": True}
        case {"tool_calls": list(calls)} if calls:
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            texts = [message["content"]] if message.get("content") else []
            return {**rest, "content": "\n".join([*texts, *map(_call, calls)])}
        case _:
            return {"content": "", **message}


def _call(call: dict[str, Any]) -> str:
    function = call.get("function", call)
    return f"<tool_call>\n{_json({key: function.get(key) for key in ('name', 'arguments')})}\n</tool_call>"


def _introduced(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    introduction = _INTRODUCTION.format(tools="\n".join(map(_json, tools)))
    if messages and messages[0].get("role") == "system":
        system = {**messages[0], "content": f"{messages[0]['content']}\n\n{introduction}"}
        return [system, *messages[1:]]
    return [{"role": "system", "content": introduction}, *messages]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
