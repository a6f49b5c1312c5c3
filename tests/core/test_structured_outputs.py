"""What StructuredOutputs takes: exactly one form, in the types that people have it in; equal ones are one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine import SamplingParams
from engine.core.structured_outputs import StructuredOutputs
from engine.errors import RequestError

SCHEMA = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"enum": ["é"]}}}


def test_equal_forms_are_one() -> None:
    text = '{ "type": "object", "properties": {"b": {"type": "null"}, "a": {"enum": ["\\u00e9"]}} }'
    forms = [
        StructuredOutputs(json=SCHEMA),
        StructuredOutputs(json=text),
        StructuredOutputs.read({"json": SCHEMA}),
    ]
    assert len(set(forms)) == 1
    # The order of properties is the answer's.
    assert list(forms[0].schema["properties"]) == ["b", "a"]
    turned = {**SCHEMA, "properties": dict(reversed(SCHEMA["properties"].items()))}  # type: ignore[attr-defined]
    assert StructuredOutputs(json=turned) != forms[0]
    assert StructuredOutputs(choice=["a", "b", "a"]) == StructuredOutputs(choice=("a", "b"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "form",
    [
        {"json": SCHEMA, "whitespace_pattern": " ?"},
        {"json": True},
        {"json_object": True},
        {"regex": "a+"},
        {"choice": ["a", "b"]},
        {"grammar": 'start: "a"'},
    ],
)
def test_they_travel_in_sampling_params(form: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=form)  # type: ignore[arg-type]
    assert params.structured_outputs == StructuredOutputs(**form)
    sent = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(sent, type=SamplingParams) == params


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({}, "found none"),
        ({"json_object": False}, "found none"),
        ({"choice": []}, "found none"),
        ({"regex": "a", "json_object": True}, "found json_object and regex"),
        ({"json": "nothing"}, "not valid JSON"),
        ({"json": "3"}, "must be a JSON Schema"),
        ({"json": {"a": {1, 2}}}, "not valid JSON"),
        ({"json": {"minimum": float("nan")}}, "not valid JSON"),
        ({"regex": ""}, "regex must be a non-empty string"),
        ({"choice": "abc"}, "choice must hold strings"),
        ({"choice": ["a", 3]}, "non-empty strings"),
        ({"json_object": "yes"}, "True or False"),
        ({"regex": "a", "whitespace_pattern": " "}, "json or json_object alone"),
        ({"jsno": {}}, "structured_outputs.jsno is not known"),
        ("json", "must be an object"),
    ],
)
def test_what_is_no_form_is_refused(form: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        SamplingParams(structured_outputs=form)
    assert caught.value.field == "structured_outputs"
