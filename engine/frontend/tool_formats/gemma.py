"""Gemma 4 and FunctionGemma: <|tool_call>call:name{key:value,…}<tool_call|>, with strings between marks of their own.

https://ai.google.dev/gemma/docs/capabilities/text/function-calling-gemma4,
https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from engine.frontend.tool_formats import values
from engine.frontend.tool_formats.format import Answer, Tool, ToolFormat, marked
from engine.frontend.tool_formats.lark import Lark, either, quote, schema, separated
from engine.frontend.tool_formats.stream import (
    CutOff,
    Malformed,
    Parsing,
    Piece,
    Source,
    accept,
    attempt,
    expect,
    mapped,
    read_until,
    skip_space,
    starts_with,
    stream_json,
    stream_until,
)

_WORD_END = re.compile(r"[,}\]\s]")


@dataclass(frozen=True, slots=True)
class _Gemma:
    """Attributes:
    quotes: What stands before and after a string.
    """

    open: str
    close: str
    quotes: str

    def grammar(self, lark: Lark, answer: Answer) -> str:
        calls = (f"{quote(f'call:{tool.name}')} {self._arguments(lark, tool)}" for tool in answer.tools)
        call = lark.rule("call", f"{either(*calls)} {lark.mark(self.close)}")
        return marked(lark, answer, self.open, separated(call, lark.mark(self.open), answer.is_parallel))

    def _arguments(self, lark: Lark, tool: Tool) -> str:
        notation = values.Notation(self._string, self._literal, _key, separator=",", nests=True)
        # One that is written as JSON is between the same braces.
        if not values.refers_within(tool.parameters):
            return schema(tool.parameters)
        return values.value(lark, notation, tool.parameters, values.definitions_of(tool.parameters))

    def _string(self, lark: Lark) -> str:
        return f"{lark.mark(self.quotes)} {lark.text_until(self.quotes)}"

    def _literal(self, lark: Lark, word: str | bool | None) -> str:
        if not isinstance(word, str) or self.quotes in word:
            return quote(values.json_literal(word))
        mark = lark.mark(self.quotes)
        return f"{mark} {quote(word)} {mark}" if word else f"{mark} {mark}"

    def parse(self, source: Source) -> Parsing[None]:
        while (yield from stream_until(source, [self.open], "content", trims=True)) is not None:
            yield from attempt(source, self._call(source), self.open)
            yield from skip_space(source)

    def _call(self, source: Source) -> Parsing[None]:
        yield from skip_space(source)
        yield from expect(source, "call:")
        name = (yield from read_until(source, ["{", self.close])).strip()
        if not name or not (yield from starts_with(source, "{")):
            raise Malformed
        yield Piece("call", name)
        yield from self._value(source)
        yield from skip_space(source)
        yield from accept(source, self.close)

    def _value(self, source: Source) -> Parsing[None]:
        """Says a value as JSON.

        Raises:
            Malformed: It is none.
        """
        yield from skip_space(source)
        if (yield from accept(source, self.quotes)):
            yield from self._quoted(source)
        elif (yield from starts_with(source, '"')):
            yield from stream_json(source, "arguments")
        elif (yield from accept(source, "{")):
            yield from self._members(source, "}")
        elif (yield from accept(source, "[")):
            yield from self._members(source, "]")
        else:
            while not (match := _WORD_END.search(source.rest)) and not source.is_closed:
                yield None
            length = match.start() if match else len(source.rest)
            word = source.rest[:length]
            source.position += length
            try:
                json.loads(word)
            except ValueError:
                raise (Malformed if match else CutOff) from None
            yield Piece("arguments", word)

    def _quoted(self, source: Source) -> Parsing[None]:
        yield Piece("arguments", '"')
        end = yield from mapped(stream_until(source, [self.quotes], "arguments"), _escape)
        if end is None:
            raise CutOff
        yield Piece("arguments", '"')

    def _members(self, source: Source, end: str) -> Parsing[None]:
        """What is between the brackets, and these."""
        yield Piece("arguments", "{" if end == "}" else "[")
        is_first = True
        while True:
            yield from skip_space(source)
            if (yield from accept(source, end)):
                break
            if not is_first:
                yield from expect(source, ",")
                yield Piece("arguments", ", ")
                yield from skip_space(source)
            is_first = False
            if end == "}":
                yield from self._key(source)
            yield from self._value(source)
        yield Piece("arguments", end)

    def _key(self, source: Source) -> Parsing[None]:
        if (yield from accept(source, self.quotes)):
            yield from self._quoted(source)
        elif (yield from starts_with(source, '"')):
            yield from stream_json(source, "arguments")
        else:
            name = yield from read_until(source, [":"])
            yield Piece("arguments", json.dumps(name.strip(), ensure_ascii=False))
        yield from skip_space(source)
        yield from expect(source, ":")
        yield Piece("arguments", ": ")


def _escape(text: str) -> str:
    """The text within a string of JSON; each character by itself, so however it is cut."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _key(name: str) -> str:
    is_plain = re.fullmatch(r"[\w$-]+(\.[\w$-]+)*", name)
    return quote(f"{name if is_plain else json.dumps(name, ensure_ascii=False)}:")


def _format(name: str, gemma: _Gemma) -> ToolFormat:
    return ToolFormat(name, (gemma.open, gemma.close, gemma.quotes), gemma.grammar, gemma.parse)


GEMMA4 = _format("gemma4", _Gemma("<|tool_call>", "<tool_call|>", '<|"|>'))
FUNCTION_GEMMA = _format("functiongemma", _Gemma("<start_function_call>", "<end_function_call>", "<escape>"))
