"""From a chat request to its prompt text and its tools."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticSerializationError, to_json

from services.core.errors import BadRequest
from services.gateway.api.chat_prompt import ChatPrompt
from services.gateway.api.schema import ChatCompletionRequest
from services.gateway.api.tools import AllowedToolsChoice, NamedTool, Tool
from services.gateway.text.chat_renderer import ChatRenderer, LocalRenderer
from services.gateway.text.tool_calls.family import ToolFamily, family_of
from services.gateway.text.tool_calls.piece import CallableTool
from services.gateway.text.tool_calls.tool_use import ToolUse
from services.model.chat_template import Chat, ChatTemplate

TOOLS_BYTES_MAX = 1 << 20  # of definitions; as a prompt they are beyond any context that is served here
# What a template gets from the rest of the request, so that a client says it once.
_OWN_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
    | {"tokenize"}
)


@dataclass(frozen=True, slots=True)
class ChatReader:
    renderer: ChatRenderer
    family: ToolFamily
    trusts_templates: bool = False  # of clients

    @classmethod
    def local(cls, template: ChatTemplate) -> "ChatReader":
        """Without a process of its own for templates: for those who serve nobody."""
        return cls(LocalRenderer(template), family_of(template))

    async def text(self, prompt: ChatPrompt, characters_max: int) -> str:
        """The prompt's text. Raises BadRequest, naming the parameter, and Overloaded."""
        return await self.renderer.render(self._chat(prompt, characters_max))

    def tool_use(self, request: ChatCompletionRequest) -> ToolUse | None:
        """None: no tool may be called. Raises BadRequest for a choice that the tools do not have."""
        tools, choice = request.tools or [], request.tool_choice
        if not tools and choice not in (None, "none", "auto"):
            raise BadRequest("'tool_choice' needs 'tools'.", "tool_choice")
        if not tools or choice == "none":
            return None
        several, form = request.parallel_tool_calls is not False, self.family.format
        match choice:
            case NamedTool(function=function):
                return ToolUse(form, _chosen(tools, [function.name]), "named", parallel=False)
            case AllowedToolsChoice(allowed_tools=allowed):
                names = [tool.function.name for tool in allowed.tools]
                return ToolUse(form, _chosen(tools, names), allowed.mode, several)
            case "required":
                return ToolUse(form, _callable(tools), "required", several)
            case _:
                return ToolUse(form, _callable(tools), "auto", several)

    def _chat(self, prompt: ChatPrompt, characters_max: int) -> Chat:
        return Chat(
            messages=[message.for_template() for message in prompt.messages],
            tools=_tools(prompt),
            documents=prompt.documents,
            add_generation_prompt=_opens_answer(prompt),
            continue_final_message=_continues(prompt),
            variables=_variables(prompt),
            template=self._template(prompt),
            plain_tools=self.family.plain,
            characters_max=characters_max,
        )

    def _template(self, prompt: ChatPrompt) -> str | None:
        if prompt.chat_template is not None and not self.trusts_templates:
            raise BadRequest(
                "This server does not take chat templates from requests (trust_request_chat_template).",
                "chat_template",
            )
        return prompt.chat_template


def _tools(prompt: ChatPrompt) -> list[dict[str, Any]] | None:
    tools = [tool.for_template() for tool in prompt.shown_tools]
    try:
        size = len(to_json(tools))
    except PydanticSerializationError as error:
        raise BadRequest(f"The tools cannot be written as JSON: {error}", "tools") from None
    if size > TOOLS_BYTES_MAX:
        raise BadRequest(f"The tools have {size} bytes, but at most {TOOLS_BYTES_MAX} are read.", "tools")
    return tools or None


def _opens_answer(prompt: ChatPrompt) -> bool:
    """Whether the prompt ends with the begin of an answer. Not, by default, if one goes on."""
    if prompt.add_generation_prompt is None:
        return not _continues(prompt)
    return prompt.add_generation_prompt


def _continues(prompt: ChatPrompt) -> bool:
    if not prompt.continue_final_message:
        return False
    if prompt.add_generation_prompt:
        raise BadRequest(
            "'continue_final_message' and 'add_generation_prompt' cannot both be true.",
            "continue_final_message",
        )
    if prompt.messages[-1].for_template()["content"] is None:
        raise BadRequest("The final message has no content to continue.", "continue_final_message")
    return True


def _variables(prompt: ChatPrompt) -> dict[str, Any]:
    variables = prompt.chat_template_kwargs or {}
    if taken := sorted(_OWN_VARIABLES & variables.keys()):
        raise BadRequest(
            f"'chat_template_kwargs' must not set '{taken[0]}', which has a parameter of its own.",
            "chat_template_kwargs",
        )
    effort = prompt.reasoning_effort
    return variables if effort is None else {"reasoning_effort": effort, **variables}


def _chosen(tools: list[Tool], names: Collection[str]) -> list[CallableTool]:
    known = {tool.function.name: tool for tool in tools}
    for name in names:
        if name not in known:
            problem = f"'tool_choice' names the tool {name[:100]!r}, which is not in 'tools'."
            raise BadRequest(problem, "tool_choice")
    return _callable([known[name] for name in dict.fromkeys(names)])


def _callable(tools: list[Tool]) -> list[CallableTool]:
    return [
        CallableTool(tool.function.name, tool.function.forced_parameters, strict=tool.function.strict is True)
        for tool in tools
    ]
