"""Reasoning: what a model thinks before it answers, between marks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.frontend.tool_formats.lark import Lark
from engine.frontend.tool_formats.stream import (
    Parsing,
    Piece,
    Source,
    accept,
    skip_space,
    stream_until,
)


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The marks around a model's reasoning, which is at the start of an answer."""

    name: str
    open: str
    close: str


REASONING_FORMATS = {
    reasoning_format.name: reasoning_format
    for reasoning_format in (
        # DeepSeek R1, Qwen 3 and many after them.
        ReasoningFormat("think", "<think>", "</think>"),
        # Magistral and Ministral 3: https://docs.mistral.ai/capabilities/reasoning/
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        # https://ai.google.dev/gemma/docs/capabilities/thinking
        ReasoningFormat("gemma4", "<|channel>thought", "<channel|>"),
    )
}


def after_reasoning(
    reasoning_format: ReasoningFormat, has_begun: bool, parse: Callable[[Source], Parsing[None]]
) -> Callable[[Source], Parsing[None]]:
    """A parser of an answer that may begin with reasoning.

    Args:
        has_begun: The prompt ends within the reasoning.
        parse: Reads what follows it.
    """

    def parse_all(source: Source) -> Parsing[None]:
        space = yield from skip_space(source)
        if has_begun or (yield from accept(source, reasoning_format.open)):
            yield from skip_space(source)
            yield from stream_until(source, [reasoning_format.close], "reasoning", trims=True)
            # What was dropped is no part of the answer.
            source.dropped = ""
            yield from skip_space(source)
        else:
            yield Piece("content", space)
        yield from parse(source)

    return parse_all


def reasoning_grammar(lark: Lark, reasoning_format: ReasoningFormat, has_begun: bool, space: str) -> str:
    """Reasoning and the mark at its end; perhaps none where the prompt has not begun it.

    Args:
        space: The grammar of what stands between it and the answer.
    """
    reasoning = f"{lark.text_until(reasoning_format.close)} {space}"
    if has_begun:
        return reasoning
    return f"({lark.mark(reasoning_format.open)} {reasoning})?"
