"""Forms of answers, checked before anything runs: what cannot be kept is refused by keyword and path."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from engine.core.grammar import lark_of
from engine.core.limits import MAX_FORM_LEVELS
from engine.core.matcher import TokenTrie, Vocabulary, grammar_problem
from engine.core.structured_outputs import FIELD, StructuredOutputs
from engine.errors import RequestError
from engine.tokenizer.tokenizer import Tokenizer

MAX_TRIALS = 2000
"""Most parts of a JSON Schema that are looked at to find the one at fault."""

MAX_SECONDS = 10.0
"""How long that part is looked for. A compilation itself is limited in what it makes, and takes a second at most."""

MAX_CHECKED = 1024
"""Forms that are remembered, with what was found."""

_OF_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
"""Keywords that hold schemas in a list."""

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords that hold schemas by name."""

_OF_VALUES = ("const", "enum", "default", "example", "examples", "required", "type")
"""Keywords that hold no schemas; any other may hold one."""


class FormChecker:
    """Compiles forms to see whether they can be kept.

    Args:
        vocab_size: Width of the model's logits.
        max_seconds: How long the part at fault is looked for.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, max_seconds: float = MAX_SECONDS) -> None:
        self._tokenizer, self._vocab_size, self._max_seconds = tokenizer, vocab_size, max_seconds
        self._problems: dict[StructuredOutputs, str | None] = {}
        self._lock = threading.Lock()

    def check(self, structured: StructuredOutputs) -> None:
        """Takes milliseconds, a second for a form of thousands of parts, up to `max_seconds` where one is at fault.

        May be called by several threads.

        Raises:
            RequestError: The form cannot be kept; names keyword and path of a JSON Schema.
        """
        try:
            problem = self._problems[structured]
        except KeyError:
            problem = self._problem(structured)
            self._remember(structured, problem)
        if problem is not None:
            raise RequestError(f"{FIELD}: {problem}", FIELD)

    def _remember(self, structured: StructuredOutputs, problem: str | None) -> None:
        with self._lock:
            self._problems[structured] = problem
            if len(self._problems) > MAX_CHECKED:
                del self._problems[next(iter(self._problems))]

    def _problem(self, structured: StructuredOutputs) -> str | None:
        if structured.json is not None:
            problem = _shape_problem(structured.schema)
            if problem is not None:
                return problem
            problem = _unkept_keyword(structured.schema)
            if problem is not None:
                return problem
        try:
            lark = lark_of(structured)
        except ValueError as error:
            return str(error)
        problem = self._grammar_problem("lark", lark)
        if problem is None or structured.json is None:
            return problem
        return self._locate(structured.schema, problem)

    def _locate(self, root: Any, of_all: str) -> str:
        """Names keyword and path of the innermost schema that cannot be kept, found by compiling each alone.

        Args:
            of_all: What is wrong with the schema as a whole.
        """
        deadline = time.monotonic() + self._max_seconds
        shared = {
            key: root[key] for key in ("$defs", "definitions") if isinstance(root, dict) and key in root
        }
        for number, (path, schema) in enumerate(_innermost_first(root, "$")):
            if number == MAX_TRIALS or time.monotonic() > deadline:
                return f"{of_all}; the keyword at fault was looked for in {number} parts, and not found"
            problem = self._schema_problem(shared | schema if isinstance(schema, dict) else schema)
            if problem is None:
                continue
            if not isinstance(schema, dict):
                return f"{path}: {problem}"
            guilty = [
                key
                for key in schema
                if key not in shared
                and self._schema_problem(shared | {name: schema[name] for name in schema if name != key})
                != problem
            ]
            keyword = f"the keyword {guilty[0]!r} at " if guilty else ""
            return f"{keyword}{path} cannot be kept: {problem}"
        return of_all

    def _schema_problem(self, schema: Any) -> str | None:
        problem = self._grammar_problem("json_schema", json.dumps(schema))
        return None if problem is None else " ".join(problem.split())

    def _grammar_problem(self, kind: str, source: str) -> str | None:
        problem = grammar_problem(self._special_tokens, kind, source)
        return None if problem is None else problem.strip().replace("\n", " | ")

    @cached_property
    def _special_tokens(self) -> TokenTrie:
        """A vocabulary of nothing but the special tokens: grammars are compiled without the others, too."""
        tokens = [b""] * self._vocab_size
        special = [token_id for token_id in self._tokenizer.special_token_ids if token_id < self._vocab_size]
        for token_id in special:
            tokens[token_id] = self._tokenizer.token_bytes(token_id)
        vocabulary = Vocabulary.of(tokens, special)
        return TokenTrie(vocabulary, self._vocab_size, self._tokenizer.eos_token_ids)


def _shape_problem(schema: Any) -> str | None:
    """What is wrong with a schema whatever it means."""
    if isinstance(schema, dict) and "x-guidance" in schema:
        return "the keyword 'x-guidance' at $ is not taken: it would change what the other keywords mean"
    stack = [(schema, 1, "$")]
    while stack:
        value, depth, path = stack.pop()
        if depth > MAX_FORM_LEVELS:
            return f"the schema is nested more than {MAX_FORM_LEVELS} deep at {path}"
        items: Any = ()
        if isinstance(value, dict):
            items = ((one, f"{path}.{key}") for key, one in value.items())
        elif isinstance(value, list):
            items = ((one, f"{path}[{index}]") for index, one in enumerate(value))
        stack += [(one, depth + 1, where) for one, where in items]
    return None


def _unkept_keyword(root: Any) -> str | None:
    """Names what llguidance takes and does not keep."""
    for path, schema in _innermost_first(root, "$"):
        if not isinstance(schema, dict):
            continue
        least, required = schema.get("minProperties", 0), schema.get("required", ())
        # It would count a name twice that it writes twice. One that is required by name is written once.
        if isinstance(least, int) and isinstance(required, Sequence) and least > len(required) + 1:
            return (
                f"the keyword 'minProperties' at {path} cannot be kept: names that are not required are not kept "
                f"apart, so it can be one more than those in 'required' at most, {len(required) + 1}"
            )
    return None


def _innermost_first(schema: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A schema's parts that are schemas, with their paths, then itself; definitions before who refers to them."""
    if isinstance(schema, dict):
        for keyword, value in sorted(
            schema.items(), key=lambda item: item[0] not in ("$defs", "definitions")
        ):
            where = f"{path}.{keyword}"
            if keyword in _OF_LISTS and isinstance(value, list):
                for index, one in enumerate(value):
                    yield from _innermost_first(one, f"{where}[{index}]")
            elif isinstance(value, dict) and keyword in _BY_NAME:
                for name, one in value.items():
                    yield from _innermost_first(one, f"{where}.{name}")
            elif isinstance(value, dict) and keyword not in _OF_VALUES:
                yield from _innermost_first(value, where)
    yield path, schema
