"""StructuredOutputs: the form that an answer must have."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.core.limits import MAX_FORM_BYTES
from engine.errors import RequestError

FIELD = "structured_outputs"
"""The name under which errors speak of it."""

FORMS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What an answer must be, in exactly one of five forms; two that ask for the same are equal.

    Attributes:
        json: A JSON Schema, as a dictionary or its text; kept as text, whose order of properties is the answer's.
        json_object: Any JSON object.
        regex: A regular expression that all of the answer matches.
        choice: One of these strings.
        grammar: A context-free grammar, in llguidance's dialect of Lark or in llama.cpp's GBNF.
        whitespace_pattern: A regular expression for the white space between JSON's tokens, which is at most once in
            each place; None allows any.

    Raises:
        RequestError: It is no form, or more than one, or a value is of another type, or it is too long.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] = ()
    grammar: str | None = None
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "choice", _choices(self.choice))
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if not isinstance(self.json_object, bool):
            raise RequestError(f"{FIELD}.json_object must be True or False, got {self.json_object!r}", FIELD)
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise RequestError(f"{FIELD}.{name} must be a non-empty string, got {value!r}", FIELD)
        given = [name for name in FORMS if getattr(self, name) not in (None, False, ())]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise RequestError(f"{FIELD} takes one of {', '.join(FORMS)}; found {found}", FIELD)
        if self.whitespace_pattern is not None and given[0] not in ("json", "json_object"):
            raise RequestError(f"{FIELD}.whitespace_pattern goes with json or json_object alone", FIELD)
        texts = (self.json, self.regex, self.grammar, self.whitespace_pattern, *self.choice)
        size = sum(len(str(text).encode("utf-8", "surrogatepass")) for text in texts if text is not None)
        if size > MAX_FORM_BYTES:
            raise RequestError(f"{FIELD}: {size} bytes; at most {MAX_FORM_BYTES} are taken", FIELD)

    @staticmethod
    def read(value: Any) -> StructuredOutputs | None:
        """The value itself, or what a dictionary with these fields says; None for None.

        Raises:
            RequestError: It is something else, or has a key that is not known.
        """
        if value is None or isinstance(value, StructuredOutputs):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(f"{FIELD} must be an object, got {value!r}", FIELD)
        given = {name: one for name, one in value.items() if one is not None}
        unknown = [name for name in given if name not in StructuredOutputs.__slots__]
        if unknown:
            known = ", ".join(StructuredOutputs.__slots__)
            raise RequestError(f"{FIELD}.{unknown[0]} is not known; there are {known}", FIELD)
        return StructuredOutputs(**given)

    @property
    def schema(self) -> Any:
        """The JSON Schema as Python values, or that of any object; None in other forms."""
        if self.json_object:
            return {"type": "object"}
        return None if self.json is None else json.loads(str(self.json))


def _schema_text(schema: Any) -> str:
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if not isinstance(schema, dict | bool):
            raise RequestError(f"{FIELD}.json must be a JSON Schema, an object, got {schema!r}", FIELD)
        return json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{FIELD}.json is not valid JSON: {error}", FIELD) from None


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"{FIELD}.choice must hold strings, got {value!r}", FIELD)
    choices = tuple(value)
    if any(not isinstance(choice, str) or not choice for choice in choices):
        raise RequestError(f"{FIELD}.choice must hold non-empty strings, got {list(choices)!r}", FIELD)
    return tuple(dict.fromkeys(choices))
