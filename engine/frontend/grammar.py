"""Forms of answers, checked before anything runs: what cannot be kept is refused by keyword and path."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from engine.core.grammar import Vocabulary, lark_of, limits, make_tokenizer
from engine.core.structured_outputs import FIELD, StructuredOutputs
from engine.errors import RequestError
from engine.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_BYTES = 2**18
"""Longest form."""

MAX_DEPTH = 64
"""Deepest nesting of a JSON Schema's values."""

MAX_TRIALS = 2000
"""Most parts of a JSON Schema that are looked at to find the one at fault."""

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
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._problems: dict[StructuredOutputs, str | None] = {}
        self._lock = threading.Lock()

    def check(self, structured: StructuredOutputs) -> None:
        """Takes milliseconds, or a second for a form of thousands of parts; may be called by several threads.

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
        texts = (structured.json, structured.regex, structured.grammar, structured.whitespace_pattern)
        size = sum(len(str(text).encode()) for text in (*texts, *structured.choice) if text is not None)
        if size > MAX_BYTES:
            return f"{size} bytes; at most {MAX_BYTES} are taken"
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
        problem = _compile(lark, self._special_tokens)
        if problem is None or structured.json is None:
            return problem
        return _locate(structured.schema) or problem

    @cached_property
    def _special_tokens(self) -> LLTokenizer:
        """A vocabulary of nothing but the special tokens: grammars are compiled without the others, too."""
        tokens = [b""] * self._vocab_size
        special = [token_id for token_id in self._tokenizer.special_token_ids if token_id < self._vocab_size]
        for token_id in special:
            tokens[token_id] = self._tokenizer.token_bytes(token_id)
        vocabulary = Vocabulary(tokens, special)
        return make_tokenizer(vocabulary, self._vocab_size, self._tokenizer.eos_token_ids)


def _compile(lark: str, tokenizer: LLTokenizer) -> str | None:
    """Why the grammar cannot be kept."""
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(lark, tokenizer, limits=limits())
    return messages[0].strip().replace("\n", " | ") if is_error else None


def _compile_schema(schema: Any) -> str | None:
    """Why the schema cannot be kept."""
    from llguidance import LLMatcher

    lark = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    is_error, messages = LLMatcher.validate_grammar_with_warnings(lark, limits=limits())
    return " ".join(messages[0].split()) if is_error else None


def _shape_problem(schema: Any) -> str | None:
    """What is wrong with a schema whatever it means."""
    if isinstance(schema, dict) and "x-guidance" in schema:
        return "the keyword 'x-guidance' at $ is not taken: it would change what the other keywords mean"
    stack = [(schema, 1, "$")]
    while stack:
        value, depth, path = stack.pop()
        if depth > MAX_DEPTH:
            return f"the schema is nested more than {MAX_DEPTH} deep at {path}"
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


def _locate(root: Any) -> str | None:
    """Names keyword and path of the innermost schema that cannot be kept, found by compiling each alone."""
    shared = {key: root[key] for key in ("$defs", "definitions") if isinstance(root, dict) and key in root}
    for number, (path, schema) in enumerate(_innermost_first(root, "$")):
        if number == MAX_TRIALS:
            return None
        problem = _compile_schema(shared | schema if isinstance(schema, dict) else schema)
        if problem is None:
            continue
        if not isinstance(schema, dict):
            return f"{path}: {problem}"
        guilty = [
            key
            for key in schema
            if key not in shared
            and _compile_schema(shared | {name: schema[name] for name in schema if name != key}) != problem
        ]
        keyword = f"the keyword {guilty[0]!r} at " if guilty else ""
        return f"{keyword}{path} cannot be kept: {problem}"
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
