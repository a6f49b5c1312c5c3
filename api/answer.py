"""Answers of a chat as every endpoint reads them: content, reasoning and calls, part by part."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from engine.frontend.chat_format import ChatTurn

LONGEST_ESCAPE = 12
"""Characters that one character takes in JSON at most: two times \\uXXXX."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool that has begun.

    Attributes:
        index: Which of the answer's calls it is.
        is_custom: Whether it takes a text, and not JSON.
    """

    index: int
    name: str
    is_custom: bool
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class AnswerPart(NamedTuple):
    """What an answer goes on with.

    Attributes:
        kind: What `text` is: content, reasoning, nothing where a call begins, or what is new of the call's input: the
            JSON of its arguments, or a custom tool's text, which comes in one piece.
        call: The call, of the last two.
    """

    kind: Literal["content", "reasoning", "call", "input"]
    text: str = ""
    call: Call | None = None


class AnswerReader:
    """Follows the text of one sample.

    Attributes:
        calls: The calls that have begun.
        ends_amid_call: Whether the answer has ended before the arguments of its last call did.
    """

    def __init__(self, turn: ChatTurn) -> None:
        self._is_plain = turn.is_plain
        self._parser = turn.parser()
        self._custom_tools = turn.custom_tools
        # The arguments of the call that runs; of a custom tool's the text is given once they are whole.
        self._arguments: str | None = None
        self.calls: list[Call] = []
        self.ends_amid_call = False

    def read(self, text: str, is_last: bool) -> Iterable[AnswerPart]:
        """What the text adds to the answer; neighbours of one kind are one part."""
        if self._is_plain:
            return (AnswerPart("content", text),) if text else ()
        return self._parts(text, is_last)

    def _parts(self, text: str, is_last: bool) -> Iterator[AnswerPart]:
        for piece in self._parser.push(text, is_last):
            match piece.kind:
                case "content" | "reasoning":
                    yield from self._end_call()
                    yield AnswerPart(piece.kind, piece.text)
                case "call":
                    yield from self._end_call()
                    call = Call(len(self.calls), piece.text, piece.text in self._custom_tools)
                    self.calls.append(call)
                    self._arguments = ""
                    yield AnswerPart("call", call=call)
                case "arguments":
                    self._arguments = (self._arguments or "") + piece.text
                    if not self.calls[-1].is_custom:
                        yield AnswerPart("input", piece.text, self.calls[-1])
        if is_last:
            self.ends_amid_call = self._arguments is not None and not _is_json(self._arguments)
            yield from self._end_call()

    def _end_call(self) -> Iterator[AnswerPart]:
        if self._arguments is not None and self.calls[-1].is_custom:
            yield AnswerPart("input", _read_input(self._arguments), self.calls[-1])
        self._arguments = None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _read_input(arguments: str) -> str:
    """The input of a custom tool, as far as it goes: an answer may be cut off, even amid a character's escapes."""
    shorter = (arguments[: len(arguments) - cut] + '"}' for cut in range(min(len(arguments), LONGEST_ESCAPE)))
    for text in (arguments, *shorter):
        try:
            found = str(json.loads(text)["input"])
            found.encode()  # no half of a character
        except (ValueError, KeyError):
            continue
        return found
    return ""
