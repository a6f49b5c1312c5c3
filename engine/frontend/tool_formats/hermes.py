"""Hermes, and Qwen 2.5 and 3, Granite 4 and others after it: <tool_call>{"name": …, "arguments": {…}}</tool_call>.

https://github.com/NousResearch/Hermes-Function-Calling, https://qwen.readthedocs.io/en/latest/framework/function_call.html
"""

from __future__ import annotations

import json

from engine.frontend.tool_formats.format import Answer, ToolFormat, marked
from engine.frontend.tool_formats.json_calls import call_grammar, parse_call
from engine.frontend.tool_formats.lark import Lark, either, nested, quote, separated
from engine.frontend.tool_formats.stream import (
    Parsing,
    Piece,
    Source,
    accept,
    attempt,
    read_until,
    skip_space,
    stream_until,
)

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def grammar(lark: Lark, answer: Answer) -> str:
    """A text that keeps a grammar of its own stands after an object that has no arguments."""
    functions = [tool for tool in answer.tools if tool.grammar is None]
    calls = [call_grammar(functions)] if functions else []
    calls += [
        f"{quote(json.dumps({'name': tool.name}))} {quote(chr(10))} {nested(tool.grammar)}"
        for tool in answer.tools
        if tool.grammar is not None
    ]
    call = lark.rule("call", rf'"\n" {either(*calls)} "\n" {lark.mark(CLOSE)}')
    return marked(lark, answer, OPEN, separated(call, rf'"\n" {lark.mark(OPEN)}', answer.is_parallel))


def parse(source: Source) -> Parsing[None]:
    while (yield from stream_until(source, [OPEN], "content", trims=True)) is not None:
        yield from attempt(source, _call(source), OPEN)
        yield from skip_space(source)
        yield from accept(source, CLOSE)
        yield from skip_space(source)


def _call(source: Source) -> Parsing[None]:
    has_arguments = yield from parse_call(source)
    if not has_arguments:
        text = yield from read_until(source, [CLOSE])
        text = text.removeprefix("\n").removesuffix("\n")
        yield Piece("arguments", json.dumps({"input": text} if text else {}, ensure_ascii=False))


HERMES = ToolFormat("hermes", (OPEN, CLOSE), grammar, parse, has_texts=True)
