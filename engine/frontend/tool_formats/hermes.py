"""Hermes, and Qwen 2.5 and 3, Granite 4 and others after it: <tool_call>{"name": …, "arguments": {…}}</tool_call>.

https://github.com/NousResearch/Hermes-Function-Calling, https://qwen.readthedocs.io/en/latest/framework/function_call.html
"""

from __future__ import annotations

from engine.frontend.tool_formats.format import Answer, ToolFormat, marked
from engine.frontend.tool_formats.json_calls import call_grammar, parse_call
from engine.frontend.tool_formats.lark import Lark, separated
from engine.frontend.tool_formats.stream import Parsing, Source, accept, attempt, skip_space, stream_until

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def grammar(lark: Lark, answer: Answer) -> str:
    call = lark.rule("call", rf'"\n" {call_grammar(answer.tools)} "\n" {lark.mark(CLOSE)}')
    return marked(lark, answer, OPEN, separated(call, rf'"\n" {lark.mark(OPEN)}', answer.is_parallel))


def parse(source: Source) -> Parsing[None]:
    while (yield from stream_until(source, [OPEN], "content", trims=True)) is not None:
        yield from attempt(source, parse_call(source), OPEN)
        yield from skip_space(source)
        yield from accept(source, CLOSE)
        yield from skip_space(source)


HERMES = ToolFormat("hermes", (OPEN, CLOSE), grammar, parse)
