"""Writing grammars in llguidance's dialect of Lark: marks, free text, JSON schemas, and JSON in other clothes.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import RequestError

ANY_TEXT = "/(?s:.*)/"

WHITE_SPACE = r"[ \n]{0,16}"
"""Between the tokens of JSON in calls: a small model would fill its answer with it."""


@dataclass(slots=True)
class Lark:
    """A grammar under construction. Methods return expressions, and add the rules that these need.

    Attributes:
        special_token_id: The id of the special token that is written so; None if there is none. Text never matches
            special tokens, so a grammar has to name them.
        never_first: What free text does not begin with, because it would begin something else.
        rules: The rules so far, by name.
    """

    special_token_id: Callable[[str], int | None]
    never_first: str | None = None
    rules: dict[str, str] = field(default_factory=dict)

    def rule(self, name: str, body: str) -> str:
        """Adds a rule, and returns its name: `name` and a number."""
        name = f"{name}_{len(self.rules)}"
        self.rules[name] = body
        return name

    def mark(self, text: str) -> str:
        """A mark: a special token where the model has one of this text."""
        token_id = self.special_token_id(text)
        return quote(text) if token_id is None else f"<[{token_id}]>"

    def text(self, without: Sequence[str], start: str = ANY_TEXT) -> str:
        """Free text, perhaps none, in which none of the marks occurs.

        Args:
            start: What else is true of it, as a regular expression between slashes.
        """
        limits = [start]
        if without:
            limits.append(f"~/(?s:.*)({'|'.join(map(_escape, without))})(?s:.*)/")
        if self.never_first is not None:
            limits.append(f"~/{_escape(self.never_first)}(?s:.*)/")
        return self.rule("TEXT", " & ".join(limits)) if len(limits) > 1 else start

    def text_until(self, mark: str) -> str:
        """Free text, perhaps none, and the mark that ends it, which occurs nowhere before."""
        if self.special_token_id(mark) is not None:
            return f"{self.text([mark])} {self.mark(mark)}"
        name = self.rule("until", self.text([]))
        self.rules[f"{name}[suffix={quote(mark)}]"] = self.rules.pop(name)
        return name

    def source(self, start: str) -> str:
        """The grammar's text, for answers that are `start`."""
        lines = [
            "%llguidance {}",
            f"start: {start}",
            *(f"{name}: {body}" for name, body in self.rules.items()),
        ]
        return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    """A literal."""
    return json.dumps(text, ensure_ascii=False)


def schema(value: dict[str, Any]) -> str:
    """JSON that a JSON schema allows.

    Raises:
        RequestError: It has llguidance's own keyword, which would change what the others mean.
    """
    if "x-guidance" in value:
        raise RequestError("the keyword 'x-guidance' is not taken in parameters of tools", "tools")
    bounded = {"x-guidance": {"whitespace_pattern": WHITE_SPACE}, **value}
    return f"%json {json.dumps(bounded, ensure_ascii=False)}"


def nested(source: str) -> str:
    """What another grammar's start is."""
    return f"%lark {{\n{source}\n}}"


def either(*expressions: str) -> str:
    return expressions[0] if len(expressions) == 1 else "(" + " | ".join(expressions) + ")"


def separated(item: str, separator: str, is_repeated: bool) -> str:
    """One item, or one and more."""
    return f"{item} ({separator} {item})*" if is_repeated else item


def _escape(text: str) -> str:
    """The text in a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")
