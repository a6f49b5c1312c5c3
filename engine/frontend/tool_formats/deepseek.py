"""DeepSeek's two: V3 and R1 write the arguments into a block of code, V3.1 as they are.

https://huggingface.co/deepseek-ai/DeepSeek-V3, https://huggingface.co/deepseek-ai/DeepSeek-V3.1#toolcall
"""

from __future__ import annotations

from engine.frontend.tool_formats.format import Answer, ToolFormat, marked
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

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
MARKS = (CALLS, END_CALLS, CALL, SEPARATOR, END_CALL)
FENCE, END_FENCE = "\n```json\n", "\n```"


def grammar_v3(lark: Lark, answer: Answer) -> str:
    head = f'{lark.mark(CALL)} "function" {lark.mark(SEPARATOR)}'
    calls = either(
        *(f"{quote(tool.name + FENCE)} {schema(tool.parameters)} {quote(END_FENCE)}" for tool in answer.tools)
    )
    return _calls(lark, answer, f"{head} {calls} {lark.mark(END_CALL)}", r'"\n"?')


def grammar_v31(lark: Lark, answer: Answer) -> str:
    separator = lark.mark(SEPARATOR)
    calls = either(*(f"{quote(tool.name)} {separator} {schema(tool.parameters)}" for tool in answer.tools))
    return _calls(lark, answer, f"{lark.mark(CALL)} {calls} {lark.mark(END_CALL)}", "")


def _calls(lark: Lark, answer: Answer, call: str, between: str) -> str:
    calls = separated(lark.rule("call", call), between, answer.is_parallel)
    return marked(lark, answer, CALLS, f"{calls} {lark.mark(END_CALLS)}")


def parse_v3(source: Source) -> Parsing[None]:
    yield from _parse(source, is_fenced=True)


def parse_v31(source: Source) -> Parsing[None]:
    yield from _parse(source, is_fenced=False)


def _parse(source: Source, is_fenced: bool) -> Parsing[None]:
    while (yield from stream_until(source, [CALLS], "content", trims=True)) is not None:
        opening = CALLS
        while (yield from attempt(source, _call(source, is_fenced), opening)):
            opening = ""
            yield from skip_space(source)
            if (yield from accept(source, END_CALLS)):
                yield from skip_space(source)
                break


def _call(source: Source, is_fenced: bool) -> Parsing[None]:
    yield from skip_space(source)
    yield from expect(source, CALL)
    if is_fenced:
        yield from expect(source, "function")
        yield from expect(source, SEPARATOR)
    name = yield from read_until(source, [FENCE if is_fenced else SEPARATOR, END_CALL])
    yield from expect(source, FENCE if is_fenced else SEPARATOR)
    if not name or "{" in name:
        raise Malformed
    yield Piece("call", name)
    yield from stream_json(source, "arguments")
    yield from skip_space(source)
    if is_fenced:
        yield from accept(source, END_FENCE.strip())
    yield from accept(source, END_CALL)


DEEPSEEK_V3 = ToolFormat("deepseek_v3", MARKS, grammar_v3, parse_v3)
DEEPSEEK_V31 = ToolFormat("deepseek_v31", MARKS, grammar_v31, parse_v31)
