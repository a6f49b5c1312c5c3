"""Calls as JSON objects: {"name": …, "arguments": …}, which several formats have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence

from engine.frontend.tool_formats.format import Tool
from engine.frontend.tool_formats.lark import either, quote, schema
from engine.frontend.tool_formats.stream import (
    Malformed,
    Parsing,
    Piece,
    Source,
    accept,
    expect,
    read_json,
    skip_space,
    stream_json,
)


def call_grammar(tools: Sequence[Tool], key: str = "arguments", end: str = "}") -> str:
    """A call of one of the tools, as templates write it.

    Args:
        key: The key of the arguments.
        end: What follows them, as text.
    """
    heads = (quote(f'{{"name": {json.dumps(tool.name)}, "{key}": ') for tool in tools)
    calls = (f"{head} {schema(tool.parameters)}" for head, tool in zip(heads, tools, strict=True))
    return f"{either(*calls)} {quote(end)}"


def parse_call(source: Source, arguments: str = "arguments") -> Parsing[bool]:
    """One object, with its keys in any order; keys of other names are read over. Returns whether it had arguments.

    Args:
        arguments: The key of the arguments.

    Raises:
        Malformed: It is none, or has no name.
    """
    yield from skip_space(source)
    yield from expect(source, "{")
    name, early, has_arguments = None, None, False
    while True:
        yield from skip_space(source)
        key = yield from read_json(source)
        yield from skip_space(source)
        yield from expect(source, ":")
        if key == "name" and name is None:
            name = yield from read_json(source)
            if not isinstance(name, str) or not name:
                raise Malformed
            yield Piece("call", name)
            if early is not None:
                yield Piece("arguments", early)
                has_arguments = True
        elif key == arguments and name is None:
            # The name must be known before its arguments can be said.
            early = json.dumps((yield from read_json(source)), ensure_ascii=False)
        elif key == arguments:
            yield from stream_json(source, "arguments")
            has_arguments = True
        else:
            yield from read_json(source)
        yield from skip_space(source)
        if (yield from accept(source, ",", "}")) != ",":
            break
    if name is None:
        raise Malformed
    return has_arguments


def parse_whole_call(source: Source, arguments: str = "arguments") -> Parsing[None]:
    """As `parse_call`; one without arguments has none, and not a text after it."""
    if not (yield from parse_call(source, arguments)):
        yield Piece("arguments", "{}")
