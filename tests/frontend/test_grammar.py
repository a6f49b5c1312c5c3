"""What forms are taken, what they keep, and what they leave out: schemas by chance and by hand, over a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

from engine.core.grammar import Grammars
from engine.core.limits import MAX_FORM_BYTES, MAX_FORM_LEVELS
from engine.core.structured_outputs import StructuredOutputs
from engine.errors import RequestError
from engine.frontend.grammar import FormChecker
from engine.loading.resolve import resolve_model
from engine.tokenizer.files import TokenizerSettings, byte_tokenizer
from engine.tokenizer.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer
from tests.helpers.forms import (
    EOS,
    NUM_TOKENS,
    VOCABULARY,
    ids_of,
    make_core,
    make_request,
    run,
    text_of,
    tokens_of,
)
from tests.helpers.schemas import Schema, closed_schemas, instances, schemas, written
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

HAND_WRITTEN = [
    json.loads(line) for line in (Path(__file__).parent / "api_schemas.jsonl").read_text().splitlines()
]
"""Schemas in the style of functions, extraction and OpenAPI: {"name", "schema"}, and the keyword that is refused."""

SETTINGS: dict[str, Any] = {
    "database": None,
    "deadline": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}

# Python's dates begin in the year 1, those of the standard in the year 0.
FORMAT_CHECKER = jsonschema.FormatChecker(
    [name for name in jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers if name != "date"]
)

KEYWORD_AND_PATH = re.compile(r"the keyword '([^']+)' at (\$\S*)")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forms") / "model"
    write_checkpoint(path, TINY_CONFIGS["llama"])
    return path


@pytest.fixture(scope="module")
def checker() -> FormChecker:
    return FormChecker(Tokenizer(byte_tokenizer(), TokenizerSettings({}, (), {})), NUM_TOKENS)


def refusal(checker: FormChecker, schema: Any) -> str | None:
    try:
        checker.check(StructuredOutputs(json=schema))
    except RequestError as error:
        return str(error)
    return None


def completed(path: Path, schemas: list[Schema], max_tokens: int = 250) -> list[str | None]:
    """What a model of random weights says in each form at temperature 1; None where it comes to no end."""
    core = make_core(path, max_model_len=256, max_num_seqs=16)
    requests = [
        make_request(
            str(number),
            structured_outputs={"json": schema, "whitespace_pattern": " ?"},
            max_tokens=max_tokens,
        )
        for number, schema in enumerate(schemas)
    ]
    results = run(core, requests)
    texts: list[str | None] = []
    for number in range(len(schemas)):
        result = results[str(number), 0]
        reason, _, error = result[-1]
        assert error is None
        texts.append(text_of(tokens_of(result)).decode() if reason == "stop" else None)
    return texts


def invalid(schemas: list[Schema], texts: list[str | None]) -> list[tuple[Schema, str, str]]:
    """The completed ones that are not what their schema says, and why."""
    found = []
    for schema, text in zip(schemas, texts, strict=True):
        if text is not None:
            try:
                jsonschema.Draft202012Validator(schema, format_checker=FORMAT_CHECKER).validate(
                    json.loads(text)
                )
            except (jsonschema.ValidationError, ValueError) as error:
                found.append((schema, text, str(error)))
    return found


@pytest.mark.parametrize("number", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_schemas_by_chance_are_kept_or_refused_by_name(
    checkpoint: Path, checker: FormChecker, number: int
) -> None:
    made: list[Schema] = []

    @settings(max_examples=number, **SETTINGS)
    @seed(0)
    @given(schemas())
    def make(schema: Schema) -> None:
        made.append(schema)

    make()
    refusals = [refusal(checker, schema) for schema in made]
    accepted = [schema for schema, problem in zip(made, refusals, strict=True) if problem is None]
    assert len(accepted) >= 0.8 * number
    for problem in refusals:
        assert problem is None or KEYWORD_AND_PATH.search(problem), problem
    texts = completed(checkpoint, accepted)
    assert sum(text is not None for text in texts) >= 0.75 * number
    print(f"{number} schemas, {len(accepted)} accepted, {sum(text is not None for text in texts)} completed")
    assert invalid(accepted, texts) == []


def test_schemas_by_hand_are_kept(checkpoint: Path, checker: FormChecker) -> None:
    assert len(HAND_WRITTEN) == len({entry["name"] for entry in HAND_WRITTEN}) == 200
    accepted = [entry["schema"] for entry in HAND_WRITTEN if "refused" not in entry]
    for entry in HAND_WRITTEN:
        problem = refusal(checker, entry["schema"])
        if "refused" in entry:
            assert problem is not None, entry["name"]
            named = KEYWORD_AND_PATH.search(problem)
            assert named is not None, problem
            assert named[1] == entry["refused"]
        else:
            assert problem is None, f"{entry['name']}: {problem}"
    texts = completed(checkpoint, accepted, max_tokens=120)
    print(f"{len(accepted)} accepted, {sum(text is not None for text in texts)} completed")
    assert sum(text is not None for text in texts) >= 80
    assert invalid(accepted, texts) == []


def check_that_instances_are_allowed(checker: FormChecker, number: int) -> None:
    grammars = Grammars(NUM_TOKENS, EOS)
    grammars.vocabulary = VOCABULARY

    @settings(max_examples=number, **SETTINGS)
    @seed(0)
    @given(closed_schemas(), st.data())
    def check(schema: Schema, data: st.DataObject) -> None:
        assume(refusal(checker, schema) is None)
        text = written(data.draw(instances(schema)))
        # Deletes are written by no form. Rounding may have led out of bounds.
        assume("\x7f" not in text and jsonschema.Draft7Validator(schema).is_valid(json.loads(text)))
        grammar = grammars.start(StructuredOutputs(json=schema), [])
        for position, token_id in enumerate(ids_of(text.encode())):
            allowed = np.frombuffer(grammar.mask.result().allowed, np.uint32)
            assert allowed[token_id // 32] >> token_id % 32 & 1, (schema, text[:position], text)
            is_complete = grammar.advance(token_id)
            grammars.start_masks([grammar])
        assert is_complete or np.frombuffer(grammar.mask.result().allowed, np.uint32)[0] >> EOS[0] & 1

    check()
    grammars.close()


@pytest.mark.parametrize("number", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_no_instance_is_excluded(checker: FormChecker, number: int) -> None:
    check_that_instances_are_allowed(checker, number)


def test_a_refusal_names_the_innermost_schema(checker: FormChecker) -> None:
    deep = {"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "string", "format": "no"}]}}
    cases = {
        "'format' at $.properties.a.items.anyOf[1]": {"properties": {"a": deep}},
        "'oneOf' at $.$defs.N": {"$ref": "#/$defs/N", "$defs": {"N": {"oneOf": [{}, {"minLength": 3}]}}},
        "'minProperties' at $.properties.a": {"properties": {"a": {"minProperties": 2, "required": []}}},
        "'not' at $.components.schemas.P": {
            "$ref": "#/components/schemas/P",
            "components": {"schemas": {"P": {"not": {}}}},
        },
        "'pattern' at $": {"type": "string", "pattern": "(?=a)b"},
        "'$ref' at $.items": {"items": {"$ref": "https://example.com/schema"}},
        "'x-guidance' at $": {"x-guidance": {"lenient": True}},
    }
    for words, schema in cases.items():
        problem = refusal(checker, schema)
        assert problem is not None
        assert f"the keyword {words} " in problem


def test_size_and_nesting_have_limits(checker: FormChecker) -> None:
    nested: Any = {}
    for _ in range(MAX_FORM_LEVELS + 1):
        nested = {"items": nested}
    assert "nested more than 64 deep at $.items.items" in str(refusal(checker, nested))
    assert f"at most {MAX_FORM_BYTES} are taken" in str(
        refusal(checker, {"description": "x" * MAX_FORM_BYTES})
    )
    # Its branches would multiply.
    many = {"anyOf": [{"properties": {f"p{number}": {"pattern": f"a{number}b"}}} for number in range(12)]}
    assert "too large" in str(refusal(checker, {"allOf": [many] * 12}))


def test_what_is_at_fault_is_looked_for_in_some_time() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), TokenizerSettings({}, (), {}))
    schema = {"properties": {"a": {"type": "string"}, "b": {"type": "string", "format": "no"}}}
    assert "'format' at $.properties.b" in str(refusal(FormChecker(tokenizer, NUM_TOKENS), schema))
    problem = str(refusal(FormChecker(tokenizer, NUM_TOKENS, max_seconds=0.0), schema))
    assert "Unknown format: no" in problem
    assert "was looked for in 0 parts, and not found" in problem
    # What can be kept is not looked through.
    assert refusal(FormChecker(tokenizer, NUM_TOKENS, max_seconds=0.0), {"properties": {"a": {}}}) is None


@pytest.mark.parametrize("alias", ["llama", pytest.param("gemma", marks=pytest.mark.slow)])
def test_characters_cut_into_tokens_come_out_whole(alias: str) -> None:
    """Whatever the cut: each way is chosen at random among those that the mask allows."""
    try:
        tokenizer = load_tokenizer(resolve_model(alias))
    except Exception:
        if alias == "llama":
            raise
        pytest.skip("gemma is not installed")
    vocab_size = tokenizer.vocab_size + 64
    grammars = Grammars(vocab_size, tokenizer.eos_token_ids)
    grammars.vocabulary = tokenizer.vocabulary()
    choices = ("日本語 😀 Zürich", "🤖👩‍👩‍👧 naïve", " \u0001\t<eos><|im_end|>")
    form = StructuredOutputs(json={"enum": list(choices)})
    source, said, cuts = np.random.default_rng(0), set(), set()
    for _ in range(60):
        grammar = grammars.start(form, [])
        detokenizer = IncrementalDetokenizer(tokenizer, [1], skip_special_tokens=True, keeps_start=True)
        pieces, token_ids, is_complete = [], [], False
        while not is_complete:
            mask = np.frombuffer(grammar.mask.result().not_ends, np.uint8)
            token_id = int(source.choice(np.flatnonzero(np.unpackbits(mask, bitorder="little"))))
            pieces.append(detokenizer.push(token_id))
            token_ids.append(token_id)
            is_complete = grammar.advance(token_id)
            grammars.start_masks([grammar])
        assert detokenizer.flush() == ""
        assert not set(token_ids) & tokenizer.special_token_ids
        said.add(json.loads("".join(pieces)))
        cuts.add(tuple(token_ids))
    assert said == set(choices)
    assert len(cuts) > 20
    grammars.close()
