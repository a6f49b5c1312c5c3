"""What a tool is, and what a format of calls is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import RequestError
from engine.frontend.tool_formats.lark import Lark
from engine.frontend.tool_formats.stream import Parsing, Source


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        parameters: The JSON schema of its arguments, an object's.
        is_custom: Whether it takes a text, and not JSON: its one argument, "input".
        grammar: The Lark grammar that the text of a custom tool keeps, which no JSON schema says.
        is_strict: Whether the tool is refused if its schema cannot be kept; else its arguments are then any object.
        is_listed: Whether the prompt lists it with the other tools; else a message tells of it.
        where: How errors call the part of a request that says what it takes.
    """

    name: str
    parameters: dict[str, Any]
    description: str | None = None
    is_custom: bool = False
    grammar: str | None = None
    is_strict: bool = True
    is_listed: bool = True
    where: str = "tools"

    @property
    def declaration(self) -> dict[str, Any]:
        """What a chat template gets."""
        description = self.description or ""
        if self.grammar is not None:
            description += f"\nThe input keeps this grammar, in Lark:\n{self.grammar}"
        function: dict[str, Any] = {"name": self.name, "description": description}
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answer with tools may be.

    Attributes:
        tools: What may be called.
        is_required: Whether it must be a call; else it may be `content`, or content before calls.
        is_parallel: Whether there may be several calls.
        content: The grammar of an answer that calls nothing, as a Lark expression; None: free text, which may stand
            before calls, too.
    """

    tools: Sequence[Tool]
    is_required: bool
    is_parallel: bool
    content: str | None = None


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls.

    Attributes:
        marks: What stands around calls and in them; those that are special tokens of a model must reach the parser.
        grammar: The expression of an answer, whose rules it adds.
        parse: Reads an answer.
        has_parallel_calls: Whether there can be several calls in an answer.
        has_texts: Whether a call can have a text that keeps a grammar of its own.
        call_id: An id as the chat template takes it; None: as it is.
    """

    name: str
    marks: tuple[str, ...]
    grammar: Callable[[Lark, Answer], str]
    parse: Callable[[Source], Parsing[None]]
    has_parallel_calls: bool = True
    has_texts: bool = False
    call_id: Callable[[str], str] | None = None


def marked(lark: Lark, answer: Answer, opening: str, calls: str) -> str:
    """An answer whose calls begin with a mark, wherever that is in it; `calls` is what follows the mark."""
    if answer.is_required:
        return f"{lark.mark(opening)} {calls}"
    if answer.content is not None:
        return f"({answer.content} | {lark.mark(opening)} {calls})"
    return f"({lark.text([opening])} | {lark.text_until(opening)} {calls})"


def unmarked(lark: Lark, answer: Answer, first: str, calls: str) -> str:
    """An answer whose calls are all of it, and begin with a character that no other answer begins with."""
    if answer.is_required:
        return calls
    if answer.content is not None:
        # Both would be tried from the first character on, and llguidance takes one of them.
        raise RequestError(
            "response_format and tools cannot be had together in this model's format of calls, which has no mark "
            'before a call: leave out one, or give tool_choice "none" or "required"',
            "response_format",
        )
    text = lark.text([], rf"/\s*|\s*[^\s\{first}](?s:.*)/")
    return f"({text} | {calls})"
