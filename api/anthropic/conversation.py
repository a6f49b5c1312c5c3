"""From a request's system prompt, messages and settings to a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from api.anthropic.protocol import Block, CountRequest, Message
from api.anthropic.tools import read_choice, read_tools
from api.conversation import Conversation, effort_arguments
from api.errors import NO_THREADS, ApiError, not_supported
from api.kept_reasoning import recall_reasoning
from engine.core.structured_outputs import StructuredOutputs
from engine.frontend.tool_formats.format import Tool

ROLES = ("user", "assistant", "system")

BILLING_HEADER = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n*")
"""What Claude Code puts before its system prompt: other words for each request, for accounting alone. In the prompt
it would leave nothing of the prefix cache."""

REFUSED = ("compaction", "container", "mcp_servers")
"""Fields that ask for what Anthropic's own servers hold or run."""

THINKING = {"enabled": True, "adaptive": True, "disabled": False}
"""Whether the model thinks, by the type of `thinking`."""

DISPLAYS = ("summarized", "omitted")
"""Values of `thinking.display`; a summary is the thoughts themselves."""

Place = tuple[str, Block]
"""A block, and how errors call it."""


def read_conversation(request: CountRequest) -> Conversation:
    """What the request asks the model to answer.

    Raises:
        ApiError: 400, what is asked for is not here, or makes no sense; names the field.
        RequestError: The form is none.
    """
    _refuse(request)
    turns = _turns(request.messages)
    tools = read_tools(request.tools or (), _loaded(turns))
    messages = list(_rendered(request.system, turns, {tool.name: tool for tool in tools}))
    choice = read_choice(request.tool_choice, tools)
    arguments = _template_arguments(request)
    if turns[-1][0] == "assistant":
        if choice.mode != "none" or "tool_calls" in messages[-1]:
            raise ApiError(
                400,
                "messages: an assistant's message at the end is gone on with, which goes without calls in it, and "
                'without tools or with tool_choice "none"',
                param="messages",
            )
        arguments["continue_final_message"] = True
    is_parallel = request.tool_choice is None or not request.tool_choice.disable_parallel_tool_use
    return Conversation(messages, tools, choice, is_parallel, _form(request), arguments)


def form_field(request: CountRequest) -> str:
    """The field that asks for a form, for errors."""
    return "output_format" if request.output_format is not None else "output_config.format"


def _refuse(request: CountRequest) -> None:
    for field in REFUSED:
        if getattr(request, field):
            raise not_supported(field)
    if request.thread:
        raise ApiError(
            400,
            "thread is not supported by this server, which holds no conversations: send all of the messages",
            param="thread",
            code=NO_THREADS,
        )
    if request.output_config is not None and request.output_config.task_budget is not None:
        raise not_supported("output_config.task_budget")
    edits = request.context_management.edits if request.context_management is not None else None
    for index, edit in enumerate(edits or ()):
        # Which thoughts of earlier turns a model is shown, its chat template says.
        if not edit.type.startswith("clear_thinking_"):
            field = f"context_management.edits[{index}].type"
            raise not_supported(f"{field} {edit.type!r}", field)


def _form(request: CountRequest) -> StructuredOutputs | None:
    asked = request.output_format
    if request.output_config is not None and request.output_config.format is not None:
        if asked is not None:
            raise ApiError(
                400,
                "output_format is the older name of output_config.format: give one of them",
                param="output_format",
            )
        asked = request.output_config.format
    if asked is None:
        return None
    field = form_field(request)
    if asked.type != "json_schema" or asked.schema is None:
        raise ApiError(400, f"{field} must be of type json_schema, with a schema", param=field)
    return StructuredOutputs(json=asked.schema)


def _template_arguments(request: CountRequest) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if request.output_config is not None and request.output_config.effort is not None:
        arguments |= effort_arguments(request.output_config.effort, "output_config.effort")
    if request.thinking is not None:
        if request.thinking.type not in THINKING:
            raise ApiError(
                400,
                f"thinking.type must be one of {', '.join(THINKING)}, got {request.thinking.type!r}",
                param="thinking.type",
            )
        arguments["enable_thinking"] = THINKING[request.thinking.type]
        if request.thinking.display not in (None, *DISPLAYS):
            raise ApiError(
                400,
                f"thinking.display must be one of {', '.join(DISPLAYS)}, got {request.thinking.display!r}",
                param="thinking.display",
            )
    return arguments


def _turns(messages: list[Message]) -> list[tuple[str, list[Place]]]:
    """Roles, each with its blocks: neighbours of one role are one turn.

    Raises:
        ApiError: 400, there are none, or a role is not known.
    """
    if not messages:
        raise ApiError(400, "messages must hold at least one message", param="messages")
    turns: list[tuple[str, list[Place]]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role not in ROLES:
            raise ApiError(
                400,
                f"{where}.role must be one of {', '.join(ROLES)}, got {message.role!r}",
                param=f"{where}.role",
            )
        places = list(_places(message.content, f"{where}.content"))
        if turns and turns[-1][0] == message.role:
            turns[-1][1].extend(places)
        else:
            turns.append((message.role, places))
    return turns


def _places(content: str | list[Block], where: str) -> Iterator[Place]:
    if isinstance(content, str):
        yield where, Block(type="text", text=content)
    else:
        yield from ((f"{where}[{index}]", block) for index, block in enumerate(content))


def _loaded(turns: list[tuple[str, list[Place]]]) -> set[str]:
    """Names of tools that a search for tools has found."""
    results = [block.content for _, places in turns for _, block in places if block.type == "tool_result"]
    blocks = [block for content in results if isinstance(content, list) for block in content]
    return {block.tool_name for block in blocks if block.type == "tool_reference" and block.tool_name}


def _rendered(
    system: str | list[Block] | None, turns: list[tuple[str, list[Place]]], tools: Mapping[str, Tool]
) -> Iterator[dict[str, Any]]:
    """The messages as templates take them.

    Texts are one string, never parts: a client sends the same text as a block in one turn, to mark it for the cache,
    and as a string in the next.
    """
    told = _system_text(system)
    if told:
        yield {"role": "system", "content": told}
    called: set[str] = set()
    for role, places in turns:
        if role == "system":
            if text := _joined(places):
                yield {"role": "system", "content": text}
        elif role == "assistant":
            message = _assistant(places)
            called |= {call["id"] for call in message.get("tool_calls", ())}
            yield message
        else:
            yield from _user(places, called, tools)


def _system_text(system: str | list[Block] | None) -> str:
    places = list(_places(system or "", "system"))
    if places:
        where, first = places[0]
        text = first.text and BILLING_HEADER.sub("", first.text)
        places[0] = (where, msgspec.structs.replace(first, text=text))
    return _joined(places)


def _joined(places: list[Place]) -> str:
    return "\n".join(filter(None, (_text(*place) for place in places)))


def _text(where: str, block: Block) -> str:
    """
    Raises:
        ApiError: 400, it is no text.
    """
    if block.type != "text":
        raise _unserved(where, block)
    if block.text is None:
        raise _missing(f"{where}.text")
    return block.text


def _assistant(places: list[Place]) -> dict[str, Any]:
    text, thoughts, calls = "", [], []
    for where, block in places:
        match block.type:
            case "thinking":
                thoughts.append(block.thinking or recall_reasoning(block.signature or ""))
            case "redacted_thinking":
                pass  # nobody but Anthropic can read it
            case "tool_use":
                if not block.id or not block.name:
                    raise _missing(f"{where}.{'name' if block.id else 'id'}")
                function = {"name": block.name, "arguments": block.input or {}}
                calls.append({"id": block.id, "type": "function", "function": function})
            case _:
                text += _text(where, block)
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
    reasoning = "\n".join(filter(None, thoughts))
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _user(places: list[Place], called: set[str], tools: Mapping[str, Tool]) -> Iterator[dict[str, Any]]:
    """Results and texts in their order.

    Args:
        called: Ids of the calls before, of which a result must be.
    """
    texts: list[Place] = []
    results = 0
    for where, block in places:
        if block.type != "tool_result":
            texts.append((where, block))
            continue
        if text := _joined(texts):
            yield {"role": "user", "content": text}
        texts = []
        yield _result(where, block, called, tools)
        results += 1
    if (text := _joined(texts)) or not results:
        yield {"role": "user", "content": text}


def _result(where: str, block: Block, called: set[str], tools: Mapping[str, Tool]) -> dict[str, Any]:
    if not block.tool_use_id:
        raise _missing(f"{where}.tool_use_id")
    if block.tool_use_id not in called:
        raise ApiError(
            400,
            f"{where}.tool_use_id {block.tool_use_id!r} is of no tool_use in the messages before",
            param=f"{where}.tool_use_id",
        )
    content = block.content or ""
    if isinstance(content, dict):
        raise ApiError(400, f"{where}.content must be text or a list of blocks", param=f"{where}.content")
    lines = [_result_line(*place, tools) for place in _places(content, f"{where}.content")]
    text = "\n".join(filter(None, lines))
    # Chat templates have no other mark for it.
    told = f"Error: {text}" if block.is_error else text
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": told}


def _result_line(where: str, block: Block, tools: Mapping[str, Tool]) -> str:
    if block.type != "tool_reference":
        return _text(where, block)
    tool = tools.get(block.tool_name or "")
    if tool is None:
        field = f"{where}.tool_name"
        raise ApiError(400, f"{field}: there is no tool {block.tool_name!r} in tools", param=field)
    if tool.is_listed:
        return f"The tool {tool.name} can be called."
    declaration = json.dumps(tool.declaration, ensure_ascii=False)
    return f"From now on this tool can be called, too:\n{declaration}"


def _unserved(where: str, block: Block) -> ApiError:
    return not_supported(f"{where}.type {block.type!r}", f"{where}.type")


def _missing(field: str) -> ApiError:
    return ApiError(400, f"missing field: {field}", param=field, code="missing_required_parameter")
