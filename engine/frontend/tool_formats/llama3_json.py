"""Llama 3.1, 3.2 and 3.3: an answer that is one object, {"name": …, "parameters": {…}}, perhaps after <|python_tag|>.

https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
"""

from __future__ import annotations

from engine.frontend.tool_formats.format import Answer, ToolFormat, unmarked
from engine.frontend.tool_formats.json_calls import call_grammar, parse_whole_call
from engine.frontend.tool_formats.lark import Lark
from engine.frontend.tool_formats.stream import (
    Parsing,
    Piece,
    Source,
    accept,
    attempt,
    skip_space,
    starts_with,
    stream_until,
)

TAG = "<|python_tag|>"


def grammar(lark: Lark, answer: Answer) -> str:
    call = lark.rule("call", call_grammar(answer.tools, "parameters"))
    if lark.special_token_id(TAG) is not None:
        call = f"{lark.mark(TAG)}? {call}"
    return unmarked(lark, answer, "{", call)


def parse(source: Source) -> Parsing[None]:
    before = yield from skip_space(source)
    before += (yield from accept(source, TAG)) or ""
    if (yield from starts_with(source, "{")):
        yield from attempt(source, parse_whole_call(source, "parameters"), before)
        yield from skip_space(source)
    else:
        yield Piece("content", before)
    yield from stream_until(source, [], "content")


LLAMA3_JSON = ToolFormat("llama3_json", (TAG,), grammar, parse, has_parallel_calls=False)
