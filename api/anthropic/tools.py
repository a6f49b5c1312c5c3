"""From Anthropic's tools and tool_choice to those of a conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence

from api.anthropic.protocol import Tool as GivenTool
from api.anthropic.protocol import ToolChoice as GivenChoice
from api.errors import ApiError
from engine.frontend.tool_formats.format import Tool
from engine.frontend.tools import NO_CALLS, ToolChoice, check_extent

CLIENT_KINDS = ("bash_", "browser_", "computer_", "memory_", "text_editor_")
"""Types of tools that the client runs and whose schemas Anthropic's models know by heart."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


def is_offered(tool: GivenTool, loaded: Collection[str]) -> bool:
    """Whether a model is told of the tool: not of what Anthropic's servers would run, nor of what waits to be found.

    Args:
        loaded: Names of tools that a search for tools has found.

    Raises:
        ApiError: 400, the client would run it, and its schema is not given.
    """
    if not is_served(tool):
        return False
    return not tool.defer_loading or tool.name in loaded


def is_served(tool: GivenTool) -> bool:
    """Whether the client runs the tool, and the model may call it itself.

    Raises:
        ApiError: 400, the client would run it, and its schema is not given.
    """
    if tool.allowed_callers and "direct" not in tool.allowed_callers:
        return False
    if tool.type in (None, "custom") or tool.input_schema is not None:
        return True
    if tool.type.startswith(CLIENT_KINDS):
        raise ApiError(
            400,
            f"tools: the schema of {tool.type!r} is not known to this server; give it as a tool with a name and an "
            "input_schema",
            param="tools",
            code="unsupported_parameter",
        )
    return False


def read_tools(given: Sequence[GivenTool], loaded: Collection[str]) -> list[Tool]:
    """The tools that are offered.

    Args:
        loaded: As in `is_offered`.

    Raises:
        ApiError: 400, one is none.
        RequestError: They are too many.
    """
    offered = [(index, tool) for index, tool in enumerate(given) if is_offered(tool, loaded)]
    tools: dict[str, Tool] = {}
    for index, one in offered:
        where = f"tools[{index}]"
        tool = _read_tool(one, where)
        if tool.name in tools:
            raise ApiError(
                400, f"{where}: the name {tool.name!r} is taken by a tool before it", param=f"{where}.name"
            )
        tools[tool.name] = tool
    check_extent([tool.declaration for tool in tools.values()], "tools")
    return list(tools.values())


def _read_tool(tool: GivenTool, where: str) -> Tool:
    if tool.name is None or not _NAME.fullmatch(tool.name):
        raise ApiError(
            400,
            f"{where}.name must be 1 to 128 letters, digits, _ and -, got {tool.name!r}",
            param=f"{where}.name",
        )
    schema = tool.input_schema
    if schema is None or schema.get("type", "object") != "object":
        raise ApiError(
            400,
            f"{where}.input_schema must be a JSON schema of type object, got {schema!r}",
            param=f"{where}.input_schema",
        )
    description = "\n".join(_description(tool))
    return Tool(
        tool.name,
        {"type": "object", **schema},
        description,
        is_strict=bool(tool.strict),
        # What is found in mid-conversation is told there: at the prompt's head it would leave nothing of the cache.
        is_listed=not tool.defer_loading,
        where=f"{where}.input_schema",
    )


def _description(tool: GivenTool) -> Iterator[str]:
    if tool.description:
        yield tool.description
    for example in tool.input_examples or ():
        yield f"An example of its input: {json.dumps(example, ensure_ascii=False)}"


def read_choice(choice: GivenChoice | None, tools: Sequence[Tool]) -> ToolChoice:
    """What of the tools may be called.

    Raises:
        ApiError: 400, it is of no known type, or asks for a call of what is not there.
    """
    kind = "auto" if choice is None else choice.type
    if kind == "none" or (kind == "auto" and not tools):
        return NO_CALLS
    if kind == "auto":
        return ToolChoice("auto")
    names = [tool.name for tool in tools]
    if kind == "any" and names:
        return ToolChoice("required")
    if kind == "tool" and choice is not None and choice.name in names:
        return ToolChoice("required", frozenset([choice.name]), is_named=True)
    if kind not in ("any", "tool"):
        raise ApiError(
            400, f"tool_choice.type must be auto, any, tool or none, got {kind!r}", param="tool_choice.type"
        )
    asked = "a call" if choice is None or kind == "any" else f"a call of {choice.name!r}"
    raise ApiError(
        400,
        f"tool_choice asks for {asked}; there are {', '.join(names) or 'no tools to call'}",
        param="tool_choice",
    )
