"""A request of the Responses API as the chat request that asks for the same, and errors the other way."""

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from services.core.errors import BadRequest
from services.gateway.api.http_errors import first_problem
from services.gateway.api.responses_api.request import (
    FunctionCallItem,
    FunctionTool,
    Item,
    JsonSchemaFormat,
    MessageItem,
    NamedFunction,
    ResponsesRequest,
)
from services.gateway.api.schema import ChatCompletionRequest

# Fields that are the same in both.
_SHARED = (
    *("model", "temperature", "top_p", "top_k", "seed", "parallel_tool_calls", "user", "service_tier"),
    *("cache_salt", "priority", "ttft_max_s", "stream"),
)
# What a chat calls it, and what it is called here. Of a message nobody knows from which item it is.
_NAMES = (
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
)


def as_chat(request: ResponsesRequest, before: Iterable[Item]) -> ChatCompletionRequest:
    """`before` is the conversation that the request goes on from. Raises BadRequest, in the request's own
    terms, for what the chat's schema refuses."""
    chat = {name: getattr(request, name) for name in _SHARED if getattr(request, name) is not None}
    chat["messages"] = _messages(request.instructions, [*before, *request.items])
    if request.max_output_tokens is not None:
        chat["max_completion_tokens"] = request.max_output_tokens
    if request.text is not None and request.text.format is not None:
        chat["response_format"] = _response_format(request)
    if request.tools:
        chat["tools"] = list(map(_tool, request.tools))
    if request.tool_choice is not None:
        chat["tool_choice"] = _tool_choice(request.tool_choice)
    try:
        return ChatCompletionRequest.model_validate(chat)
    except ValidationError as error:
        raise in_own_terms(first_problem(error.errors(), chat)) from error


def in_own_terms(error: BadRequest) -> BadRequest:
    """An error of the chat request, with the names that the client used."""
    for theirs, ours in _NAMES:
        if error.param is not None and _is_in(error.param, theirs):
            rest = "" if theirs == "messages" else error.param.removeprefix(theirs)
            message = str(error).replace(error.param, ours + rest, 1)
            return type(error)(message, ours + rest, error.code)
    if error.param is not None and error.param.startswith("tool"):
        param = error.param.replace(".function.", ".")
        return type(error)(str(error).replace(error.param, param, 1), param, error.code)
    return error


def _is_in(param: str, name: str) -> bool:
    return param == name or param.startswith((f"{name}.", f"{name}["))


def _messages(instructions: str | None, items: Iterable[Item]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        if isinstance(item, FunctionCallItem):
            _add_call(messages, item)
        elif isinstance(item, MessageItem):
            messages.append({"role": item.role, "content": _content(item.parts)})
        else:
            content = _content(item.parts)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
    return messages


def _add_call(messages: list[dict[str, Any]], item: FunctionCallItem) -> None:
    """Calls belong to the assistant's message before them, as they came in one answer."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _content(parts: list[str]) -> str | list[dict[str, str]]:
    return parts[0] if len(parts) == 1 else [{"type": "text", "text": part} for part in parts]


def _response_format(request: ResponsesRequest) -> dict[str, Any]:
    assert request.text is not None
    form = request.text.format
    if not isinstance(form, JsonSchemaFormat):
        return {"type": "text" if form is None else form.type}
    schema: dict[str, Any] = {"name": form.name, "schema": form.schema_}
    if form.strict is not None:
        schema["strict"] = form.strict
    if form.description is not None:
        schema["description"] = form.description
    return {"type": "json_schema", "json_schema": schema}


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _tool_choice(choice: str | NamedFunction) -> str | dict[str, Any]:
    if isinstance(choice, NamedFunction):
        return {"type": "function", "function": {"name": choice.name}}
    return choice
