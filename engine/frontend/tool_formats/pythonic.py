"""Calls as a Python list, [get_weather(city="Paris", days=3)]: Llama 4 and 3.2 as they are, LFM2 between marks.

https://www.llama.com/docs/model-cards-and-prompt-formats/llama4/, https://docs.liquid.ai/docs/key-concepts/tool-use
"""

from __future__ import annotations

import ast
import json
import re
import warnings

from engine.frontend.tool_formats import values
from engine.frontend.tool_formats.format import Answer, Tool, ToolFormat, marked, unmarked
from engine.frontend.tool_formats.lark import Lark, either, quote, separated
from engine.frontend.tool_formats.stream import (
    CutOff,
    Malformed,
    Parsing,
    Piece,
    Source,
    accept,
    attempt,
    expect,
    read_until,
    skip_space,
    starts_with,
    stream_until,
)

OPEN, CLOSE = "<|tool_call_start|>", "<|tool_call_end|>"

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_STRING = r'"([^"\\\x00-\x1f]|\\[nrt"\\])*"', r"'([^'\\\x00-\x1f]|\\[nrt'\\])*'"
_STRUCTURE = re.compile(r"""["'()\[\]{},]""")


def grammar(lark: Lark, answer: Answer) -> str:
    return unmarked(lark, answer, "[", _calls(lark, answer))


def marked_grammar(lark: Lark, answer: Answer) -> str:
    return marked(lark, answer, OPEN, f"{_calls(lark, answer)} {lark.mark(CLOSE)}")


def _calls(lark: Lark, answer: Answer) -> str:
    call = lark.rule("call", either(*(_call(lark, tool) for tool in answer.tools)))
    return f'"[" {separated(call, quote(", "), answer.is_parallel)} "]"'


def _call(lark: Lark, tool: Tool) -> str:
    values.check_members(tool)
    notation = values.Notation(
        lambda lark: either(*(f"/{string}/" for string in _STRING)),
        lambda lark, word: either(*map(quote, _python(word))),
        lambda name: quote(f"{name}="),
        separator=", ",
        nests=False,
    )
    arguments = values.members(lark, notation, tool.parameters, values.definitions_of(tool.parameters))
    return f'{quote(tool.name + "(")} {arguments} ")"'


def _python(word: str | bool | None) -> list[str]:
    """The ways to write it."""
    return sorted(
        {json.dumps(word, ensure_ascii=False), repr(word)} if isinstance(word, str) else {repr(word)}
    )


def parse(source: Source) -> Parsing[None]:
    before = yield from skip_space(source)
    if (yield from starts_with(source, "[")):
        yield from attempt(source, _list(source), before)
        yield from skip_space(source)
    else:
        yield Piece("content", before)
    yield from stream_until(source, [], "content")


def parse_marked(source: Source) -> Parsing[None]:
    while (yield from stream_until(source, [OPEN], "content", trims=True)) is not None:
        yield from attempt(source, _list(source), OPEN)
        yield from skip_space(source)
        yield from accept(source, CLOSE)
        yield from skip_space(source)


def _list(source: Source) -> Parsing[None]:
    yield from skip_space(source)
    yield from expect(source, "[")
    while True:
        yield from skip_space(source)
        name = (yield from read_until(source, ["("])).strip()
        if not _NAME.fullmatch(name):
            raise Malformed
        yield from expect(source, "(")
        yield Piece("call", name)
        yield from _arguments(source)
        yield from skip_space(source)
        if (yield from accept(source, ",", "]")) != ",":
            return


def _arguments(source: Source) -> Parsing[None]:
    """The arguments up to the closing bracket, each said as JSON once it is whole."""
    before = "{"
    while True:
        yield from skip_space(source)
        if (yield from accept(source, ")")):
            break
        name = (yield from read_until(source, ["="])).strip()
        yield from expect(source, "=")
        text = yield from _read_value(source)
        yield Piece("arguments", f"{before}{json.dumps(name)}: {_to_json(text)}")
        before = ", "
        yield from accept(source, ",")
    yield Piece("arguments", "{}" if before == "{" else "}")


def _read_value(source: Source) -> Parsing[str]:
    """The text of a value, up to the comma or bracket that ends it.

    Raises:
        CutOff: None comes.
    """
    depth, place, quoted = 0, 0, ""
    while True:
        rest = source.rest
        while place < len(rest):
            character = rest[place]
            if quoted:
                if character == "\\":
                    place += 1
                elif character == quoted:
                    quoted = ""
            elif character in "\"'":
                quoted = character
            elif character in "([{":
                depth += 1
            elif character in ")]}," and depth == 0:
                source.position += place
                return rest[:place]
            elif character in ")]}":
                depth -= 1
            place += 1
        if source.is_closed:
            raise CutOff
        yield None


def _to_json(text: str) -> str:
    """
    Raises:
        Malformed: It is neither JSON nor a literal of Python that has a like in JSON.
    """
    try:
        value = json.loads(text)
    except ValueError:
        try:
            with warnings.catch_warnings():
                # Of escapes that Python does not know, which it leaves as they are.
                warnings.simplefilter("ignore")
                value = ast.literal_eval(text.strip())
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise Malformed from None
    return json.dumps(value, ensure_ascii=False)


PYTHONIC = ToolFormat("pythonic", (), grammar, parse)
LFM2 = ToolFormat("lfm2", (OPEN, CLOSE), marked_grammar, parse_marked)
