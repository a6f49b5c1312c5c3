"""gpt-oss: an answer is messages in channels, and a call is a message to a function.

https://developers.openai.com/cookbook/articles/openai-harmony
"""

from __future__ import annotations

import json
import re

from engine.frontend.tool_formats.format import Answer, ToolFormat
from engine.frontend.tool_formats.lark import Lark, either, nested, quote, schema
from engine.frontend.tool_formats.stream import (
    Kind,
    Malformed,
    Parsing,
    Piece,
    Source,
    accept,
    attempt,
    read_until,
    read_until_end,
    skip_space,
    starts_with,
    stream_json,
    stream_until,
)

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
ENDS = (END, CALL, RETURN)
MARKS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)

_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")
_CHANNEL = re.compile(re.escape(CHANNEL) + r"(\w+)")


def grammar(lark: Lark, answer: Answer) -> str:
    """Any number of analyses and preambles, then a call or what is said in the end."""
    channel, message = lark.mark(CHANNEL), lark.mark(MESSAGE)
    before = lark.rule(
        "before",
        f"{channel} {either(quote('analysis'), quote('commentary'))} {message} {lark.text_until(END)} "
        f'{lark.mark(START)} "assistant"',
    )
    last = [_call(lark, answer)] if answer.tools else []
    if not answer.is_required:
        last.append(f'{channel} "final" {message} {answer.content or lark.text(MARKS)}')
    return f"{before}* {either(*last)}"


def _call(lark: Lark, answer: Answer) -> str:
    """The recipient may stand in either half of the head."""
    channel = lark.mark(CHANNEL)
    calls = []
    for tool in answer.tools:
        recipient = f" to=functions.{tool.name}"
        if tool.grammar is not None:
            head = f"{channel} {quote(f'commentary{recipient}')} {lark.mark(MESSAGE)}"
            calls.append(f"{head} {nested(tool.grammar)}")
            continue
        heads = either(
            f"{channel} {quote(f'commentary{recipient} ')} {lark.mark(CONSTRAIN)} {quote('json')}",
            f"{quote(recipient)} {channel} {quote('commentary json')}",
        )
        calls.append(f"{heads} {lark.mark(MESSAGE)} {schema(tool.parameters)}")
    return lark.rule("call", either(*calls))


def parse(source: Source) -> Parsing[None]:
    while (yield from attempt(source, _message(source))):
        yield from skip_space(source)
        if (yield from accept(source, START)):
            yield from accept(source, "assistant")
    # What has no channel is said to the user.
    yield from stream_until(source, [], "content")


def _message(source: Source) -> Parsing[None]:
    if not (yield from starts_with(source, CHANNEL)) and not (yield from starts_with(source, " to=")):
        raise Malformed
    head = yield from read_until(source, [MESSAGE, START, *ENDS])
    recipient, channel = _RECIPIENT.search(head), _CHANNEL.search(head)
    if not (yield from accept(source, MESSAGE)) or (recipient or channel) is None:
        raise Malformed
    if recipient is None:
        kind: Kind = "reasoning" if channel is not None and channel[1] == "analysis" else "content"
        yield from stream_until(source, ENDS, kind)
        return
    yield Piece("call", recipient[1])
    if not head.rstrip().endswith("json"):
        text = yield from read_until_end(source, ENDS)
        yield Piece("arguments", json.dumps({"input": text}, ensure_ascii=False))
        return
    if (yield from starts_with(source, "{")):
        yield from stream_json(source, "arguments")
    yield from stream_until(source, ENDS, "arguments", trims=True)


HARMONY = ToolFormat("harmony", MARKS, grammar, parse, has_parallel_calls=False, has_texts=True)
