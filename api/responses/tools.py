"""From tools as the Responses API has them to those that a model may call, and from its calls back to their names.

A namespace's tools are offered one by one, as namespace__name; a call of one says both, as Codex CLI asks for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from api.errors import ApiError, not_supported
from engine.errors import RequestError
from engine.frontend.tool_formats.format import Tool
from engine.frontend.tools import (
    ToolChoice,
    check_extent,
    read_custom,
    read_function,
    read_tool_choice,
)

KNOWN_MEMBERS = {
    "function": ("type", "name", "description", "parameters", "strict"),
    "custom": ("type", "name", "description", "format"),
    "namespace": ("type", "name", "tools"),
}
"""Members of a tool that are read, by its type. Other types are OpenAI's own: no model here is told of them."""

_NAMESPACE = re.compile(r"[a-zA-Z0-9_-]{1,64}")

WITHOUT_EFFECT = ("allowed_callers", "async", "defer_loading", "output_schema")
"""Members that OpenAI knows and that make no difference here."""


@dataclass(frozen=True, slots=True)
class ToolName:
    """What a client calls a tool."""

    name: str
    namespace: str | None = None

    @property
    def offered(self) -> str:
        """What the model calls it."""
        return self.name if self.namespace is None else f"{self.namespace}__{self.name}"


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of a request.

    Attributes:
        keeps_grammars: Whether a call can keep a Lark grammar in the model's format of calls; else the model is shown
            it, and may write another text.
        tools: What the model may call.
        names: What the client calls them, by what the model does.
        unknown: Members and types of tools that nothing here reads.
    """

    keeps_grammars: bool
    tools: list[Tool] = field(default_factory=list)
    names: dict[str, ToolName] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def add(self, given: Any, where: str) -> None:
        """Adds a tool, or those of a namespace, that the prompt lists.

        Raises:
            RequestError: It is none, or its name is taken; `where` names it.
        """
        for name, tool in _read(given, where, None, self.unknown):
            if name.offered in self.names:
                raise RequestError(f"{where}: the name {name.offered!r} is taken by a tool before it", where)
            self._put(name, tool)

    def add_later(self, given: Any, where: str) -> Iterator[Tool]:
        """Adds what an item brings, and yields what is new: the model is told of it where the item stands.

        Listed at the prompt's head it would leave nothing of the cache.

        Raises:
            RequestError: It is none; `where` names it.
        """
        for name, tool in _read(given, where, None, self.unknown):
            if name.offered not in self.names:
                yield self._put(name, replace(tool, is_listed=False))

    def _put(self, name: ToolName, tool: Tool) -> Tool:
        tool = tool if self.keeps_grammars else _without_grammar(tool)
        self.names[name.offered] = name
        self.tools.append(tool)
        return tool

    def check(self) -> None:
        """
        Raises:
            RequestError: They are too many.
        """
        check_extent([tool.declaration for tool in self.tools], "tools")


def _read(
    given: Any, where: str, namespace: str | None, unknown: list[str]
) -> Iterator[tuple[ToolName, Tool]]:
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(kind, str):
        raise RequestError(f"{where} must be a tool with a type, got {given!r}", where)
    if kind not in KNOWN_MEMBERS or (namespace is not None and kind == "namespace"):
        unknown.append(f"tools[].type {kind}")
        return
    members = {name: value for name, value in given.items() if name in KNOWN_MEMBERS[kind]}
    unknown += [f"tools[].{name}" for name in given if name not in (*members, *WITHOUT_EFFECT)]
    del members["type"]
    if kind == "namespace":
        name, inner = members.get("name"), members.get("tools")
        if not isinstance(name, str) or not _NAMESPACE.fullmatch(name) or not isinstance(inner, list):
            raise RequestError(
                f"{where} must be a namespace with a list of tools and a name of letters, digits, _ and -",
                where,
            )
        for index, one in enumerate(inner):
            yield from _read(one, f"{where}.tools[{index}]", name, unknown)
    elif kind == "function":
        strict = members.pop("strict", None)
        tool = read_function(members, where)
        yield _named(replace(tool, is_strict=strict is True), namespace)
    else:
        yield _named(read_custom({**members, "format": _format(members.get("format"))}, where), namespace)


def _named(tool: Tool, namespace: str | None) -> tuple[ToolName, Tool]:
    name = ToolName(tool.name, namespace)
    return name, replace(tool, name=name.offered)


def _format(given: Any) -> Any:
    """A custom tool's format as chats have it."""
    if isinstance(given, Mapping) and given.get("type") == "grammar":
        return {"type": "grammar", "grammar": {name: given.get(name) for name in ("syntax", "definition")}}
    return given


def _without_grammar(tool: Tool) -> Tool:
    if tool.grammar is None:
        return tool
    return replace(tool, grammar=None, description=tool.declaration["function"]["description"])


def read_choice(choice: Any, box: Toolbox) -> ToolChoice:
    """What of the tools may be called.

    Raises:
        ApiError: 400, it asks for a tool that this server cannot run.
        RequestError: It asks for a tool that is not there, or is no choice.
    """
    match choice:
        case {"type": "function" | "custom" as kind}:
            choice = _named_as_in_chat(choice, kind)
        case {"type": "allowed_tools", "mode": mode, "tools": [*allowed]}:
            # Which of OpenAI's own tools may be called makes no difference where they are not there.
            ours = [_named_as_in_chat(one, one["type"]) for one in allowed if _is_ours(one)]
            choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": ours}}
        case {"type": str(kind)} if kind != "allowed_tools":
            raise not_supported(f"tool_choice of type {kind!r}", "tool_choice")
    return read_tool_choice(choice, box.tools)


def _is_ours(tool: Any) -> bool:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("type"), str):
        raise ApiError(400, "tool_choice.tools must hold tools with a type", param="tool_choice.tools")
    return tool["type"] in ("function", "custom")


def _named_as_in_chat(tool: Mapping[str, Any], kind: str) -> dict[str, Any]:
    name, namespace = tool.get("name"), tool.get("namespace")
    if not isinstance(name, str) or not isinstance(namespace, str | None):
        raise ApiError(400, f"tool_choice must name a tool, got {tool!r}", param="tool_choice")
    return {"type": kind, kind: {"name": ToolName(name, namespace).offered}}
