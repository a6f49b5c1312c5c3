"""Parsing text that comes in pieces: parsers are generators that yield what they found, or None to wait for more.

A parser reads from a `Source`. Where it needs text that has not come yet it yields None, and goes on when there is
more; so what it says does not depend on where the text was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

Kind = Literal["reasoning", "content", "call", "arguments"]


class Piece(NamedTuple):
    """A part of an answer.

    Attributes:
        kind: What `text` is: reasoning, content, the name of a function whose call begins here, or what the text of
            that call's arguments goes on with.
    """

    kind: Kind
    text: str


Result = TypeVar("Result")
Parsing = Generator[Piece | None, None, Result]


class Malformed(Exception):
    """The text is not what the format has at this place."""


class CutOff(Malformed):
    """The text ends before what the format has at this place."""


@dataclass(slots=True)
class Source:
    """Text as it comes.

    Attributes:
        text: What is not dropped yet.
        position: Where in it the parser stands.
        is_closed: Whether nothing more comes.
        is_kept: Whether what was read stays, because it may have to be given back; see `attempt`.
        dropped: The white space before the mark that was read last.
    """

    text: str = ""
    position: int = 0
    is_closed: bool = False
    is_kept: bool = False
    dropped: str = ""

    def feed(self, text: str) -> None:
        if not self.is_kept:
            self.text, self.position = self.rest, 0
        self.text += text

    @property
    def rest(self) -> str:
        return self.text[self.position :]


class StreamParser:
    """Follows one answer.

    Args:
        rules: The parser.
    """

    def __init__(self, rules: Callable[[Source], Parsing[None]]) -> None:
        self._source = Source()
        self._pieces = rules(self._source)

    def push(self, text: str, is_last: bool = False) -> list[Piece]:
        """What `text` adds; neighbours of one kind are one piece. After the last text nothing may be pushed."""
        self._source.feed(text)
        self._source.is_closed = is_last
        pieces: list[Piece] = []
        for piece in self._pieces:
            if piece is None:
                break
            if not piece.text:
                continue
            if pieces and piece.kind == pieces[-1].kind != "call":
                piece = Piece(piece.kind, pieces.pop().text + piece.text)
            pieces.append(piece)
        return pieces


def more(source: Source) -> Parsing[bool]:
    """Waits for text after the position; False if none comes."""
    while source.position == len(source.text):
        if source.is_closed:
            return False
        yield None
    return True


def accept(source: Source, *literals: str) -> Parsing[str | None]:
    """Goes past the first of the literals that the text goes on with; None, and stays, if it is none of them."""
    while True:
        rest = source.rest
        for literal in literals:
            if rest.startswith(literal):
                source.position += len(literal)
                return literal
            if literal.startswith(rest) and not source.is_closed:
                break
        else:
            return None
        yield None


def expect(source: Source, literal: str) -> Parsing[None]:
    """
    Raises:
        Malformed: The text does not go on with the literal.
    """
    if (yield from accept(source, literal)) is None:
        raise CutOff if literal.startswith(source.rest) else Malformed


def starts_with(source: Source, literal: str) -> Parsing[bool]:
    """Whether the text goes on with the literal; stays where it is."""
    found = yield from accept(source, literal)
    source.position -= len(found or "")
    return found is not None


def skip_space(source: Source) -> Parsing[str]:
    """Goes past white space, and returns it."""
    space = ""
    while (yield from more(source)) and source.text[source.position].isspace():
        space += source.text[source.position]
        source.position += 1
    return space


def read_until(source: Source, marks: Collection[str]) -> Parsing[str]:
    """The text before the first of the marks, at which the position is then. No mark may hold another.

    Raises:
        CutOff: None comes.
    """
    while True:
        rest = source.rest
        found = [place for mark in marks if (place := rest.find(mark)) >= 0]
        if found:
            source.position += min(found)
            return rest[: min(found)]
        if source.is_closed:
            raise CutOff
        yield None


def read_until_end(source: Source, marks: Collection[str]) -> Parsing[str]:
    """The text before the first of the marks, or before the text's end; goes past the mark."""
    while True:
        found = [(place, -len(mark), mark) for mark in marks if (place := source.rest.find(mark)) >= 0]
        if found or source.is_closed:
            place, _, mark = min(found, default=(len(source.rest), 0, ""))
            text = source.rest[:place]
            source.position += place + len(mark)
            return text
        yield None


def stream_until(
    source: Source, marks: Collection[str], kind: Kind, trims: bool = False
) -> Parsing[str | None]:
    """Yields the text before the first of the marks, goes past it, and returns it; None if the text ends without one.

    Args:
        trims: White space before a mark is dropped.
    """
    while True:
        rest = source.rest
        # Hardly any text has a mark, or the beginning of one.
        near = [mark for mark in marks if mark[0] in rest]
        found = [(place, -len(mark), mark) for mark in near if (place := rest.find(mark)) >= 0]
        if found:
            place, _, mark = min(found)
            text = rest[:place]
            source.position += place + len(mark)
            shown = text.rstrip() if trims else text
            source.dropped = text[len(shown) :]
            yield Piece(kind, shown)
            return mark
        length = len(rest) if source.is_closed or not near else _whole(rest, near)
        if trims and not source.is_closed:
            length = len(rest[:length].rstrip())
        source.position += length
        yield Piece(kind, rest[:length])
        if source.is_closed:
            return None
        yield None


def _whole(text: str, marks: Collection[str]) -> int:
    """The length of `text` without what may be the beginning of a mark at its end."""
    longest = max(map(len, marks)) - 1
    for start in range(max(0, len(text) - longest), len(text)):
        if any(mark.startswith(text[start:]) for mark in marks):
            return start
    return len(text)


_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[,}\]\s]")


def stream_json(source: Source, kind: Kind) -> Parsing[None]:
    """Yields the text of one JSON value as it comes; a value that is cut off ends where the text does.

    It is as long as its brackets and quotes say, whatever stands between them.
    """
    yield from skip_space(source)
    if not (yield from more(source)):
        return
    if source.text[source.position] not in '{["':
        while True:
            match = _SCALAR_END.search(source.rest)
            length = match.start() if match else len(source.rest)
            yield from _advance(source, length, kind)
            if match or not (yield from more(source)):
                return
    depth, in_string = 0, False
    while (yield from more(source)):
        match = (_STRING_END if in_string else _STRUCTURE).search(source.text, source.position)
        if match is None:
            yield from _advance(source, len(source.rest), kind)
            continue
        end = match.end()
        if match[0] == "\\":
            # The character after it belongs to it.
            if end == len(source.text) and not source.is_closed:
                yield from _advance(source, match.start() - source.position, kind)
                yield None
                continue
            end = min(end + 1, len(source.text))
        elif match[0] == '"':
            in_string = not in_string
        else:
            depth += 1 if match[0] in "{[" else -1
        yield from _advance(source, end - source.position, kind)
        if depth == 0 and not in_string:
            return


def _advance(source: Source, length: int, kind: Kind) -> Parsing[None]:
    text = source.text[source.position : source.position + length]
    source.position += length
    yield Piece(kind, text)


def read_json(source: Source) -> Parsing[Any]:
    """One JSON value.

    Raises:
        Malformed: There is none, or it is cut off.
    """
    text = []
    for piece in stream_json(source, "arguments"):
        if piece is None:
            yield None
        else:
            text.append(piece.text)
    try:
        return json.loads("".join(text))
    except ValueError:
        raise (Malformed if source.rest else CutOff) from None


def mapped(parsing: Parsing[Result], change: Callable[[str], str]) -> Parsing[Result]:
    """Yields what a parser does, with texts changed."""
    while True:
        try:
            piece = next(parsing)
        except StopIteration as end:
            result: Result = end.value
            return result
        yield piece and Piece(piece.kind, change(piece.text))


def attempt(source: Source, parsing: Parsing[None], opening: str = "") -> Parsing[bool]:
    """Yields what a parser of a call does; returns whether it came to its end.

    Where it finds the text malformed before it has said anything, what it has read is content, and so is `opening`,
    the mark that was read before. What it has said stands. A call that is cut off before its name is nothing.
    """
    source.text, source.position, source.is_kept = source.rest, 0, True
    opening, source.dropped = source.dropped + opening, ""
    try:
        for piece in parsing:
            if piece is not None:
                source.is_kept = False
            yield piece
    except CutOff:
        source.position = len(source.text)
        return False
    except Malformed:
        if source.is_kept:
            yield Piece("content", opening + source.text[: source.position])
        return False
    finally:
        source.is_kept = False
    return True
