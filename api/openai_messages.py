"""From messages and tools as OpenAI's chats have them to a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from api.conversation import Conversation, effort_arguments, verbosity_arguments
from api.errors import ApiError, not_supported
from api.protocol import ChatCompletionRequest, Message, ToolCall, convert_member, without_nulls
from api.sampling import named_as_asked
from engine.errors import RequestError
from engine.frontend.tools import NO_CALLS, ToolChoice, read_functions, read_tool_choice, read_tools

if TYPE_CHECKING:
    from engine.core.structured_outputs import StructuredOutputs
    from engine.frontend.tool_formats.format import Tool

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Those that are known; any other is left to the model's chat template."""

# What the server itself hands to the template.
CONTINUE = "continue_final_message"
RESERVED_TEMPLATE_ARGUMENTS = (
    "self", "messages", "tools", "choice", "is_parallel", "form", "adds_special_tokens", "add_generation_prompt",
    "continue_final_message",
)  # fmt: skip


def read_conversation(request: ChatCompletionRequest, form: StructuredOutputs | None) -> Conversation:
    """What the request asks the model to answer.

    Args:
        form: What an answer must be that calls nothing.

    Raises:
        ApiError: 400, messages that are empty, or hold more than text; tools that are none.
    """
    if not request.messages:
        raise ApiError(400, "messages must hold at least one message", param="messages")
    messages = [_plain_message(given, f"messages[{i}]") for i, given in enumerate(request.messages)]
    _check_results(messages)
    tools, choice, is_parallel = _tools(request)
    arguments = _template_arguments(request)
    adds_special_tokens = request.add_special_tokens is True
    if not request.continue_final_message:
        return Conversation(messages, tools, choice, is_parallel, form, arguments, adds_special_tokens)
    if request.add_generation_prompt:
        problem = "continue_final_message excludes add_generation_prompt"
    elif messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
        problem = "continue_final_message needs an assistant's message with text at the end"
    elif choice != NO_CALLS:
        problem = 'continue_final_message goes with tool_choice "none" alone'
    else:
        return Conversation(
            messages,
            form=form,
            template_arguments={**arguments, CONTINUE: True},
            adds_special_tokens=adds_special_tokens,
        )
    raise ApiError(400, problem, param=CONTINUE)


@contextmanager
def named_as_in_chat(request: ChatCompletionRequest) -> Iterator[None]:
    """Within it, errors of the engine name the fields of this endpoint."""
    try:
        with named_as_asked(request):
            yield
    except RequestError as error:
        match error.field:
            case "prompt":
                raise RequestError(f"messages: {error}", "messages", error.code) from None
            case "messages" if request.continue_final_message:
                raise RequestError(str(error), CONTINUE, error.code) from None
        raise


def _template_arguments(request: ChatCompletionRequest) -> dict[str, Any]:
    arguments = dict(request.chat_template_kwargs or {})
    for name in RESERVED_TEMPLATE_ARGUMENTS:
        if name in arguments:
            raise ApiError(
                400, f"chat_template_kwargs must not hold {name}", param=f"chat_template_kwargs.{name}"
            )
    if request.reasoning_effort is not None:
        arguments |= effort_arguments(request.reasoning_effort, "reasoning_effort")
    if request.verbosity is not None:
        arguments |= verbosity_arguments(request.verbosity, "verbosity")
    if request.documents is not None:
        arguments["documents"] = request.documents
    if request.enable_thinking is not None:
        arguments["enable_thinking"] = request.enable_thinking
    arguments["add_generation_prompt"] = request.add_generation_prompt is not False
    return arguments


def _tools(request: ChatCompletionRequest) -> tuple[list[Tool], ToolChoice, bool]:
    """The tools, what of them may be called, and whether several may."""
    if not request.functions:
        if request.function_call not in (None, "none", "auto"):
            raise ApiError(
                400, "function_call asks for a call, and there are no functions", param="function_call"
            )
        tools = read_tools(request.tools or [])
        choice = read_tool_choice(request.tool_choice, tools)
        return tools, choice, request.parallel_tool_calls is not False
    if request.tools:
        raise ApiError(400, "functions is the older name of tools: give one of them", param="functions")
    tools = read_functions(request.functions)
    asked: Any = request.function_call
    if isinstance(asked, dict):
        asked = {"type": "function", "function": asked}
    elif asked == "required":
        raise ApiError(400, 'function_call must be none, auto or {"name": …}', param="function_call")
    return tools, read_tool_choice(asked, tools, "function_call"), False


def _plain_message(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The message as templates take it, with what only they know of; `where` names it in errors."""
    plain = without_nulls(given)
    message = convert_member(given, Message, where)
    if message.audio is not None:
        raise not_supported(f"{where}.audio")
    for field in ("function_call", "tool_calls", "reasoning_content"):
        if getattr(message, field) not in (None, []) and message.role != "assistant":
            raise ApiError(
                400, f"{where}.{field} is an assistant's, not a {message.role}'s", param=f"{where}.{field}"
            )
        plain.pop(field, None)
    # Templates know the developer's role by its older name.
    plain["role"] = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    if message.content is not None:
        plain["content"] = _plain_content(plain["content"], where)
    elif message.role == "assistant":
        plain["content"] = None
    elif message.role in ROLES:
        raise ApiError(400, f"missing field: {where}.content", param=f"{where}.content")
    if message.reasoning_content:
        plain["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        calls = zip(given["tool_calls"], message.tool_calls, strict=True)
        plain["tool_calls"] = [
            _plain_call(one, call, f"{where}.tool_calls[{i}]") for i, (one, call) in enumerate(calls)
        ]
    elif message.function_call is not None:
        name, arguments = message.function_call.name, message.function_call.arguments or ""
        function = {"name": name, "arguments": arguments}
        plain["tool_calls"] = [{"id": name, "type": "function", "function": function}]
    if plain["role"] == "tool":
        plain["tool_call_id"] = _tool_call_id(message, where)
    return plain


def _tool_call_id(message: Message, where: str) -> str:
    """Which call a result is of; calls of older clients are known by their functions' names."""
    field = "name" if message.role == "function" else "tool_call_id"
    given: str | None = getattr(message, field)
    if not given:
        raise ApiError(400, f"missing field: {where}.{field}", param=f"{where}.{field}")
    return given


def _check_results(messages: list[dict[str, Any]]) -> None:
    """Refuses a result of a call that nobody has made, which templates drop or take for another's."""
    made: set[str] = set()
    for index, message in enumerate(messages):
        made |= {call["id"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and message["tool_call_id"] not in made:
            raise ApiError(
                400,
                f"messages[{index}].tool_call_id {message['tool_call_id']!r} is of no call in the messages before",
                param=f"messages[{index}].tool_call_id",
            )


def _plain_call(given: dict[str, Any], call: ToolCall, where: str) -> dict[str, Any]:
    if not call.id:
        raise ApiError(400, f"missing field: {where}.id", param=f"{where}.id")
    kind = call.type or "function"
    if kind == "custom" and call.custom is not None:
        # As it was called: with one argument.
        function: dict[str, Any] = {"name": call.custom.name, "arguments": {"input": call.custom.input or ""}}
    elif kind == "function" and call.function is not None:
        function = {"name": call.function.name, "arguments": call.function.arguments or ""}
    else:
        raise ApiError(400, f"{where} must be a function or custom, with its part of that name", param=where)
    plain = without_nulls(given)
    plain.pop("custom", None)
    return {**plain, "id": call.id, "type": "function", "function": function}


def _plain_content(content: str | list[dict[str, Any]], where: str) -> str | list[dict[str, Any]]:
    """Text, or parts of text."""
    if isinstance(content, str):
        return content
    parts = []
    for index, given in enumerate(content):
        place = f"{where}.content[{index}]"
        part = without_nulls(given)
        if part["type"] != "text":
            raise not_supported(f"{place}.type {part['type']!r}", f"{place}.type")
        if "text" not in part:
            raise ApiError(400, f"missing field: {place}.text", param=f"{place}.text")
        parts.append(part)
    return parts
