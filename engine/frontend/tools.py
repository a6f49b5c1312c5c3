"""Tools as OpenAI's clients describe them: read, checked, and chosen from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.core.limits import MAX_TOOLS, MAX_TOOLS_BYTES
from engine.errors import RequestError
from engine.frontend.tool_formats.format import Tool

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_KNOWN = {
    "function": ("name", "description", "parameters", "strict"),
    "custom": ("name", "description", "format"),
}
"""Members of a tool, by its type."""

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What of the tools an answer may call.

    Attributes:
        mode: none: nothing; auto: what it wants to; required: one of them at least.
        names: Which; None: all.
        is_named: Whether it is one call of the one that is named.
    """

    mode: Literal["none", "auto", "required"]
    names: frozenset[str] | None = None
    is_named: bool = False


NO_CALLS = ToolChoice("none")


def read_tools(tools: Any, field: str = "tools") -> list[Tool]:
    """Tools from [{"type": "function", "function": {"name", "description", "parameters"}}, …], and custom tools.

    A custom tool becomes a function with one argument, "input".

    Args:
        field: How errors call the list.

    Raises:
        RequestError: One is none; names it.
    """
    return _read_all(tools, field, _read_tool)


def read_functions(functions: Any, field: str = "functions") -> list[Tool]:
    """Tools from the older form of them, [{"name", "description", "parameters"}, …].

    Raises:
        RequestError: As `read_tools`.
    """
    return _read_all(functions, field, read_function)


def check_extent(tools: Sequence[Any], field: str) -> None:
    """
    Raises:
        RequestError: They are too many, or take too much as JSON.
    """
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"{field} holds {len(tools)} tools; at most {MAX_TOOLS} are taken", field)
    size = len(json.dumps(tools, default=str, ensure_ascii=False).encode())
    if size > MAX_TOOLS_BYTES:
        raise RequestError(f"{field} has {size} bytes; at most {MAX_TOOLS_BYTES} are taken", field)


def _read_all(tools: Any, field: str, read_one: Callable[[Any, str], Tool]) -> list[Tool]:
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise RequestError(f"{field} must be a list of tools", field)
    check_extent(tools, field)
    read: list[Tool] = []
    names: set[str] = set()
    for index, tool in enumerate(tools):
        one = read_one(tool, f"{field}[{index}]")
        if one.name in names:
            raise RequestError(f"{field}[{index}]: the name {one.name!r} is taken by a tool before it", field)
        names.add(one.name)
        read.append(one)
    return read


def _read_tool(tool: Any, where: str) -> Tool:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if kind not in ("function", "custom"):
        raise RequestError(f"{where}.type must be function or custom, got {kind!r}", f"{where}.type")
    _check_members(tool, ("type", kind), where)
    where = f"{where}.{kind}"
    body = tool.get(kind)
    if not isinstance(body, Mapping):
        raise RequestError(f"missing field: {where}", where)
    return read_function(body, where) if kind == "function" else read_custom(body, where)


def read_function(function: Any, where: str) -> Tool:
    """A tool from {"name", "description", "parameters"}; where no parameters are given, it takes none.

    Raises:
        RequestError: It is none; `where` names it.
    """
    name, description = _head(function, "function", where)
    parameters = function.get("parameters")
    if parameters is None:
        parameters = _NO_PARAMETERS
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise RequestError(
            f"{where}.parameters must be a JSON schema of type object, got {parameters!r}",
            f"{where}.parameters",
        )
    return Tool(name, {"type": "object", **parameters}, description, where=f"{where}.parameters")


def read_custom(custom: Mapping[str, Any], where: str) -> Tool:
    """A tool from {"name", "description", "format"}: a function with one argument, "input".

    Raises:
        RequestError: It is none; `where` names it.
    """
    name, description = _head(custom, "custom", where)
    form = custom.get("format") or {"type": "text"}
    place = f"{where}.format"
    text: dict[str, Any] = {"type": "string"}
    match form:
        case {"type": "text"}:
            pass
        case {"type": "grammar", "grammar": {"syntax": "regex", "definition": str(pattern)}}:
            text["pattern"] = f"^(?:{pattern})$"
        case {"type": "grammar", "grammar": {"syntax": "lark", "definition": str(grammar)}}:
            return Tool(name, _input(text), description, is_custom=True, grammar=grammar, where=place)
        case _:
            raise RequestError(
                f'{place} must be {{"type": "text"}} or {{"type": "grammar", "grammar": {{"syntax": "lark" or '
                f'"regex", "definition": …}}}}',
                place,
            )
    return Tool(name, _input(text), description, is_custom=True, where=place)


def _input(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"input": text},
        "required": ["input"],
        "additionalProperties": False,
    }


def _check_members(body: Any, known: tuple[str, ...], where: str) -> None:
    """Refuses a member that nobody reads: a tool with misspelt parameters would take none."""
    for name, value in body.items():
        if name not in known and value is not None:
            raise RequestError(
                f"unknown field: {where}.{name}; there are {', '.join(known)}", f"{where}.{name}"
            )


def _head(body: Any, kind: str, where: str) -> tuple[str, str | None]:
    name, description = body.get("name"), body.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.name must be 1 to 64 letters, digits, _ and -, got {name!r}", f"{where}.name"
        )
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{where}.description must be text, got {description!r}", f"{where}.description")
    _check_members(body, _KNOWN[kind], where)
    return name, description


def read_tool_choice(choice: Any, tools: Sequence[Tool], field: str = "tool_choice") -> ToolChoice:
    """A choice from "none", "auto", "required", one tool by name, or a list of allowed ones; None is auto.

    Raises:
        RequestError: It is none of these, or names a tool that there is not.
    """
    known = {tool.name for tool in tools}
    mode, names = "required", known
    match choice:
        case None | "auto":
            return ToolChoice("auto") if tools else NO_CALLS
        case "none":
            return NO_CALLS
        case "required":
            pass
        case {"type": "function" | "custom"}:
            mode, names = "named", {_name_of(choice, field)}
        case {"type": "allowed_tools", "allowed_tools": {"mode": str(mode), "tools": [*allowed]}}:
            names = {_name_of(tool, field) for tool in allowed}
        case _:
            raise RequestError(
                f"{field} must be none, auto, required, or name a function of tools, got {choice!r}", field
            )
    if not tools:
        raise RequestError(f"{field} asks for a call, and there are no tools to call", field)
    for name in sorted(names - known):
        raise RequestError(f"{field}: there is no tool {name!r}; there are {', '.join(sorted(known))}", field)
    if mode not in ("auto", "required", "named") or not names:
        raise RequestError(f"{field}.allowed_tools must have the mode auto or required, and tools", field)
    return ToolChoice("auto" if mode == "auto" else "required", frozenset(names), is_named=mode == "named")


def _name_of(tool: Any, field: str) -> str:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    body = tool.get(kind) if kind in ("function", "custom") else None
    name = body.get("name") if isinstance(body, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(f"{field} must name a tool by its type and name, got {tool!r}", field)
    return name
