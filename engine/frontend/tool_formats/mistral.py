"""Mistral's two: [TOOL_CALLS][{"name": …, "arguments": {…}}, …], and since v11 [TOOL_CALLS]name[ARGS]{…} a call.

https://docs.mistral.ai/capabilities/function_calling/, https://docs.mistral.ai/guides/tokenization/
"""

from __future__ import annotations

import hashlib

from engine.frontend.tool_formats.format import Answer, ToolFormat, marked
from engine.frontend.tool_formats.json_calls import call_grammar, parse_whole_call
from engine.frontend.tool_formats.lark import Lark, either, quote, schema, separated
from engine.frontend.tool_formats.stream import (
    Malformed,
    Parsing,
    Piece,
    Source,
    accept,
    attempt,
    expect,
    read_until,
    skip_space,
    stream_json,
    stream_until,
)

OPEN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
LENGTH_OF_ID = 9
"""What the templates ask of an id: so many letters and digits."""


def call_id(given: str) -> str:
    if len(given) == LENGTH_OF_ID and given.isalnum():
        return given
    return hashlib.sha256(given.encode()).hexdigest()[:LENGTH_OF_ID]


def list_grammar(lark: Lark, answer: Answer) -> str:
    call = lark.rule(
        "call", f'{call_grammar(answer.tools, end="")} (", \\"id\\": \\"" /[a-zA-Z0-9]{{9}}/ "\\"")? "}}"'
    )
    return marked(lark, answer, OPEN, f'" "? "[" {separated(call, quote(", "), answer.is_parallel)} "]"')


def parse_list(source: Source) -> Parsing[None]:
    while (yield from stream_until(source, [OPEN], "content", trims=True)) is not None:
        if (yield from attempt(source, _first(source), OPEN)):
            yield from skip_space(source)
            while (yield from accept(source, ",", "]")) == ",":
                yield from attempt(source, parse_whole_call(source), ",")
                yield from skip_space(source)
            yield from skip_space(source)


def _first(source: Source) -> Parsing[None]:
    yield from skip_space(source)
    yield from expect(source, "[")
    yield from parse_whole_call(source)


def named_grammar(lark: Lark, answer: Answer) -> str:
    arguments = lark.mark(ARGUMENTS)
    calls = (f"{quote(tool.name)} {arguments} {schema(tool.parameters)}" for tool in answer.tools)
    call = lark.rule("call", either(*calls))
    return marked(lark, answer, OPEN, separated(call, lark.mark(OPEN), answer.is_parallel))


def parse_named(source: Source) -> Parsing[None]:
    while (yield from stream_until(source, [OPEN], "content", trims=True)) is not None:
        yield from attempt(source, _named(source), OPEN)
        yield from skip_space(source)


def _named(source: Source) -> Parsing[None]:
    head = yield from read_until(source, [ARGUMENTS, "{", OPEN])
    yield from expect(source, ARGUMENTS)
    name = head.partition(ID)[0].strip()
    if not name:
        raise Malformed
    yield Piece("call", name)
    yield from stream_json(source, "arguments")


MISTRAL = ToolFormat("mistral", (OPEN,), list_grammar, parse_list, call_id=call_id)
MISTRAL_NAMED = ToolFormat("mistral_v11", (OPEN, ID, ARGUMENTS), named_grammar, parse_named, call_id=call_id)
