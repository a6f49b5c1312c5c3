"""JSON Schemas by chance, over the keywords of draft 2020-12, whose instances are short."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema

Schema = dict[str, Any]

NAMES = ("a", "b", "city", "f", "id", "k", "m")
"""Of properties, in the order in which schemas have them."""

PATTERNS = ("^[a-z]{1,5}$", "^(ab|cd){1,3}$", "^[0-9]{3}-[0-9]{2}$", "^[A-Z][a-z]{0,4}$")
OPEN_PATTERNS = ("[0-9]", "^x", "é$", "a.b")
FORMATS = ("date", "date-time", "time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration")
CLOSED_FORMATS = ("date", "date-time", "time", "ipv4", "ipv6")
"""Those of which hypothesis-jsonschema knows what they are."""

TEXTS = ("", "x", "two words", "日本", "Zürich", "😀", 'a "quoted" \\ one', "line\nline", "123", "null")

REFUSED: Schema = {
    "not": {"const": 3},
    "if": {"type": "string"},
    "uniqueItems": True,
    "contains": {"type": "string"},
    "propertyNames": {"maxLength": 3},
    "dependentRequired": {"a": ["b"]},
    "unevaluatedProperties": False,
    "format": "no-format",
    "oneOf": [{"title": "anything"}, {"description": "anything else"}],
    "minProperties": 9,
}
"""Keywords, with values, that the engine does not keep."""


class Maker:
    """Makes schemas of bounded depth from a source of chance."""

    def __init__(self, source: random.Random, closed: bool = False) -> None:
        """
        Args:
            closed: Draft 7's keywords alone, and no object of which a property is not named or of one pattern.
        """
        self.source, self.closed = source, closed
        self.choice = source.choice

    def often(self, probability: float) -> bool:
        return self.source.random() < probability

    def integer(self, low: int, high: int) -> int:
        return self.source.randint(low, high)

    def scalar(self) -> Any:
        return self.choice((None, True, False, self.integer(-50, 50), 2.5, self.choice(TEXTS)))

    def value(self) -> Any:
        match self.integer(0, 4):
            case 0:
                return [self.scalar() for _ in range(self.integer(0, 2))]
            case 1:
                return {name: self.scalar() for name in NAMES if self.often(0.3)}
        return self.scalar()

    def string(self) -> Schema:
        kind = self.choice(("length", "length", "pattern", "open", "format"))
        if kind == "pattern":
            return {"type": "string", "pattern": self.choice(PATTERNS)}
        if kind == "format":
            return {"type": "string", "format": self.choice(CLOSED_FORMATS if self.closed else FORMATS)}
        least = self.integer(0, 3)
        schema = {"type": "string", "minLength": least, "maxLength": least + self.integer(3, 8)}
        return schema | {"pattern": self.choice(OPEN_PATTERNS)} if kind == "open" else schema

    def number(self) -> Schema:
        schema: Schema = {"type": self.choice(("integer", "number"))}
        low = self.integer(-1000, 1000) * self.choice((1, 1, 10, 1000, 0.1))
        if self.often(0.5):
            schema[self.choice(("minimum", "exclusiveMinimum"))] = low
        if self.often(0.5):
            schema[self.choice(("maximum", "exclusiveMaximum"))] = low + self.integer(12, 500)
        if self.often(0.25):
            is_whole = self.closed or schema["type"] == "integer"
            schema["multipleOf"] = self.choice((2, 5, 10) if is_whole else (1, 0.5, 0.25, 20))
        return schema

    def leaf(self) -> Schema:
        match self.integer(0, 9):
            case 0 | 1 | 2:
                return self.string()
            case 3 | 4 | 5:
                return self.number()
            case 6:
                return {"const": self.value()}
            case 7:
                return {"enum": [self.value() for _ in range(self.integer(1, 4))]}
            case 8:
                return {"type": self.choice(("boolean", "null"))}
        return {"type": self.source.sample(("integer", "boolean", "null"), self.integer(1, 3))}

    def object(self, depth: int) -> Schema:
        names = [name for name in NAMES if self.often(0.4)]
        schema: Schema = {"type": "object", "properties": {name: self.part(depth - 1) for name in names}}
        kind = self.choice(("closed",) * 6 + ("patterned", "named", "open"))
        if self.closed and kind in ("named", "open"):
            kind = "closed"
        schema["required"] = [name for name in names if kind in ("named", "patterned") or self.often(0.5)]
        if kind == "closed":
            return schema | {"additionalProperties": False}
        if kind == "open":
            return schema
        # Further properties by kind or name, and so many at most: all that have a place of their own must be there.
        schema["additionalProperties"] = self.part(depth - 1) if kind == "named" else False
        if kind == "patterned":
            schema["patternProperties"] = {"^x[0-9]{1,2}$": self.part(depth - 1)}
        schema["minProperties"] = len(names) + self.integer(0, 1)
        schema["maxProperties"] = schema["minProperties"] + self.integer(0, 1)
        return schema

    def array(self, depth: int) -> Schema:
        least = self.integer(0, 2)
        if self.closed or self.often(0.7):
            most = least + self.integer(0, 2)
            return {"type": "array", "items": self.part(depth - 1), "minItems": least, "maxItems": most}
        prefix = [self.part(depth - 1) for _ in range(self.integer(1, 3))]
        if self.often(0.5):
            return {
                "type": "array",
                "prefixItems": prefix,
                "items": False,
                "minItems": min(least, len(prefix)),
            }
        most = len(prefix) + self.integer(0, 2)
        return {"type": "array", "prefixItems": prefix, "items": self.part(depth - 1), "maxItems": most}

    def combination(self, depth: int) -> Schema:
        kind = self.choice(("anyOf", "anyOf", "oneOf", "oneOf", "allOf"))
        if kind == "anyOf":
            return {"anyOf": [self.part(depth - 1) for _ in range(self.integer(1, 3))]}
        if kind == "oneOf":
            return {"oneOf": [self.branch(number, depth) for number in range(self.integer(1, 3))]}
        match self.integer(0, 3):
            case 0:
                return {"allOf": [self.part(depth - 1), self.part(depth - 1)]}
            case 1:
                return {**self.part(depth - 1), "anyOf": [self.part(depth - 1), self.part(depth - 1)]}
        limits = {"minLength": self.integer(0, 2), "maxLength": self.integer(3, 9)}
        return {"allOf": [{"type": "string", "maxLength": 20}, limits]}

    def branch(self, number: int, depth: int) -> Schema:
        """As APIs have it: a property tells the branches of `oneOf` apart."""
        schema = self.object(depth - 1)
        schema["properties"] = {"_kind": {"const": f"k{number}"}, **schema["properties"]}
        schema["required"] = ["_kind", *schema["required"]]
        for limit in ("minProperties", "maxProperties"):
            if limit in schema:
                schema[limit] += 1
        return schema

    def part(self, depth: int) -> Schema:
        """A schema of so many levels at most, perhaps with annotations."""
        kinds = ("leaf",) * 4 + ("object", "array", "combination", "reference")
        match self.choice(kinds) if depth > 0 else "leaf":
            case "object":
                schema = self.object(depth)
            case "array":
                schema = self.array(depth)
            case "combination" if not self.closed or self.often(0.3):
                schema = self.combination(depth)
            case "reference" if not self.closed:
                schema = {"$ref": "#/$defs/" + self.choice(("One", "Two", "List"))}
            case _:
                schema = self.leaf()
        notes = {"title": self.choice(TEXTS), "description": "what it is", "default": self.value()}
        return {name: note for name, note in notes.items() if self.often(0.1)} | schema

    def whole(self) -> Schema:
        """A schema whose root is mostly an object, with definitions; in one of ten a keyword of `REFUSED`."""
        root = self.object(3) if self.often(0.75) else self.part(3)
        if self.often(0.1):
            keyword = self.choice(sorted(REFUSED))
            self.choice(list(needed_in(root)))[keyword] = REFUSED[keyword]
        if self.closed:
            return {"$schema": "http://json-schema.org/draft-07/schema#", **root}
        if self.often(0.1) and "anyOf" not in root:
            root.pop("type", None)
        inner = {"next": {"$ref": "#/$defs/List"}, "value": self.leaf()}
        chain = {"type": "object", "properties": inner, "required": ["value"], "additionalProperties": False}
        definitions = {"One": self.leaf(), "Two": self.object(1), "List": chain}
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def needed_in(schema: Schema) -> Iterator[Schema]:
    """The schema and those within it that have no choice about them."""
    yield schema
    for inner in schema.get("properties", {}).values():
        yield from needed_in(inner)


def schemas() -> st.SearchStrategy[Schema]:
    """Schemas of draft 2020-12."""
    return st.randoms(use_true_random=True).map(lambda source: Maker(source).whole())


def closed_schemas() -> st.SearchStrategy[Schema]:
    """Schemas of draft 7, whose instances have their properties in alphabetical order."""
    return st.randoms(use_true_random=True).map(lambda source: Maker(source, closed=True).whole())


def instances(schema: Schema) -> st.SearchStrategy[Any]:
    """Values of one of `closed_schemas`, by hypothesis-jsonschema but for objects, which it cannot do with every
    version of hypothesis."""
    if "properties" in schema:
        required = {name: instances(schema["properties"][name]) for name in schema["required"]}
        others = {
            name: instances(inner) for name, inner in schema["properties"].items() if name not in required
        }
        named = st.fixed_dictionaries(required, optional=others)
        least, most = (schema.get(limit, 0) - len(required) for limit in ("minProperties", "maxProperties"))
        if most <= 0:
            return named
        ((_, inner),) = schema["patternProperties"].items()
        names = st.from_regex("x[0-9]{1,2}", fullmatch=True, alphabet="x0123456789")
        more = st.dictionaries(names, instances(inner), min_size=least, max_size=most)
        return st.builds(lambda one, two: one | two, named, more)
    if "items" in schema:
        return st.lists(instances(schema["items"]), min_size=schema["minItems"], max_size=schema["maxItems"])
    for branches in ("anyOf", "oneOf"):
        if branches in schema:
            return st.one_of([instances(branch) for branch in schema[branches]])
    return st.sampled_from(schema["enum"]) if "enum" in schema else from_schema(schema)


def written(value: Any) -> str:
    """A value's text as every form has it: within bounds there are no exponents, and no negative zero."""

    def plain(value: Any) -> Any:
        match value:
            case dict():
                return {name: plain(one) for name, one in value.items()}
            case list():
                return [plain(one) for one in value]
            case float():
                return int(value) if value == 0 or abs(value) > 1e15 else round(value, 4) or 0
        return value

    return json.dumps(plain(value), sort_keys=True, ensure_ascii=False)
