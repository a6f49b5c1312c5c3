"""Grammars of arguments in notations that are JSON's but for their quotes and words, from JSON schemas.

What a schema says with words that are not known here is written as JSON, which parsers of these formats read, too: so
each value keeps its whole schema.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any

from engine.errors import RequestError
from engine.frontend.tool_formats.format import Tool
from engine.frontend.tool_formats.lark import Lark, either, quote, schema

_SAYS_NOTHING = {"title", "description", "default", "examples", "deprecated", "$comment", "strict"}
_WORDS: dict[str, tuple[type, ...]] = {
    "string": (str,), "boolean": (bool,), "null": (NoneType,), "any": (str, bool, NoneType)
}  # fmt: skip
"""What has a notation of its own, by type."""
_OBJECT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}


@dataclass(frozen=True, slots=True)
class Notation:
    """How values are written.

    Attributes:
        string: The grammar of any string.
        literal: A string, true, false or null, as text; as Lark expression.
        key: A key of an object, and what stands between it and its value.
        separator: What stands between the members of an array or object.
        nests: Whether arrays and objects within are written so, too; else as JSON.
    """

    string: Callable[[Lark], str]
    literal: Callable[[Lark, str | bool | None], str]
    key: Callable[[str], str]
    separator: str
    nests: bool


def value(lark: Lark, notation: Notation, value_schema: Any, definitions: dict[str, Any]) -> str:
    """A value that the schema allows.

    Args:
        definitions: What the schema may refer to: the keywords of the whole one that hold definitions.
    """
    if not isinstance(value_schema, dict):
        return schema({} if value_schema else {"not": {}})
    keywords = {key: value for key, value in value_schema.items() if key not in _SAYS_NOTHING}
    if isinstance(keywords.get("type"), list):
        options = [{**keywords, "type": kind} for kind in keywords["type"]]
        return either(*(value(lark, notation, option, definitions) for option in options))
    match keywords:
        case {"enum": [*words]} if keywords.keys() <= {"type", "enum"}:
            kinds = _WORDS.get(keywords.get("type", "any"), ())
            if all(isinstance(word, kinds) for word in words):
                return either(*(notation.literal(lark, word) for word in words))
        case {"anyOf": [*options]} if keywords.keys() == {"anyOf"}:
            return either(*(value(lark, notation, option, definitions) for option in options))
        case {"type": "string"} if keywords.keys() == {"type"}:
            return notation.string(lark)
        case {"type": "boolean"} if keywords.keys() == {"type"}:
            return either(notation.literal(lark, True), notation.literal(lark, False))
        case {"type": "null"} if keywords.keys() == {"type"}:
            return notation.literal(lark, None)
        case {"type": "array", "items": items} if notation.nests and keywords.keys() == {"type", "items"}:
            item = value(lark, notation, items, definitions)
            return f'"[" ({item} ({quote(notation.separator)} {item})*)? "]"'
        case {"type": "object", "properties": dict(), **others} if (
            notation.nests and others.keys() <= _OBJECT
        ):
            return f'"{{" {members(lark, notation, keywords, definitions)} "}}"'
    return schema(value_schema | definitions)


def members(lark: Lark, notation: Notation, keywords: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The properties of an object in the schema's order, those that are not required perhaps left out."""
    required = keywords.get("required", [])
    properties = keywords.get("properties", {})
    # What follows if nothing was written yet, and if something was.
    first, further = '""', '""'
    for name, property_schema in reversed(properties.items()):
        member = f"{notation.key(name)} {value(lark, notation, property_schema, definitions)}"
        member = lark.rule("member", f"{member} {further}")
        options = [member] if name in required else [member, first]
        following = f"{quote(notation.separator)} {member}"
        first = lark.rule("first", either(*options))
        further = lark.rule("further", either(following, *([] if name in required else [further])))
    return first


def check_members(tool: Tool) -> None:
    """Refuses parameters that `members` would keep in part.

    Raises:
        RequestError: Names the keyword.
    """
    parameters = tool.parameters
    unknown = parameters.keys() - _OBJECT - _SAYS_NOTHING
    missing = set(parameters.get("required", [])) - parameters.get("properties", {}).keys()
    if not refers_within(parameters):
        unknown = {"$ref"}
    if unknown or missing:
        what = (
            f"the keyword {min(unknown)!r}"
            if unknown
            else f"required {min(missing)!r}, which is no property,"
        )
        raise RequestError(
            f"{tool.where}: {what} at $ cannot be kept in the model's format of calls", tool.where
        )


def refers_within(value: Any) -> bool:
    """Whether all references in a schema are to its definitions, which its parts can have by themselves."""
    if isinstance(value, list):
        return all(map(refers_within, value))
    if not isinstance(value, dict):
        return True
    reference = value.get("$ref", "#/$defs/")
    is_near = not isinstance(reference, str) or reference.startswith(("#/$defs/", "#/definitions/"))
    return is_near and all(map(refers_within, value.values()))


def definitions_of(parameters: dict[str, Any]) -> dict[str, Any]:
    return {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}


def json_literal(word: str | bool | None) -> str:
    return json.dumps(word, ensure_ascii=False)
