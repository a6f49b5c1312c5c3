"""From fields of a request to the form of its answer: OpenAI's response_format, vLLM's field and its older ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from api.protocol import GenerationRequest, without_nulls
from engine.core.structured_outputs import FIELD, StructuredOutputs
from engine.errors import RequestError

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""The older fields, by the fields of `StructuredOutputs` that they are."""

_OF_JSON_SCHEMA = ("name", "description", "schema", "strict")


def structured_outputs_of(request: GenerationRequest) -> StructuredOutputs | None:
    """The form that the answer must have.

    Raises:
        RequestError: A field is not what it must be, or two ask for a form.
    """
    asked = _asked(request)
    if len(asked) > 1:
        names = " and ".join(asked)
        raise RequestError(f"{names} both ask for a form of the answer; give one", next(iter(asked)))
    if request.guided_whitespace_pattern is not None and "guided_json" not in asked:
        field = "guided_whitespace_pattern"
        raise RequestError(f"{field} goes with guided_json alone", field)
    if not asked:
        return None
    (form,) = asked.values()
    with named_by_form(request):
        return StructuredOutputs.read(form)


@contextmanager
def named_by_form(request: GenerationRequest) -> Iterator[None]:
    """Within it errors of the form name the field that asked for it."""
    try:
        yield
    except RequestError as error:
        if error.field != FIELD:
            raise
        name = next(iter(_asked(request)), FIELD)
        raise RequestError(str(error).replace(FIELD, name, 1), name, error.code) from None


def _asked(request: GenerationRequest) -> dict[str, dict[str, Any]]:
    """By field, what asks for a form, as fields of `StructuredOutputs`."""
    asked = {}
    if request.response_format is not None:
        form = _read_response_format(request.response_format)
        if form is not None:
            asked["response_format"] = form
    if request.structured_outputs is not None:
        asked[FIELD] = request.structured_outputs
    for name, kind in GUIDED.items():
        if (value := getattr(request, name)) is not None:
            asked[name] = {kind: value, "whitespace_pattern": request.guided_whitespace_pattern}
    return asked


def _read_response_format(given: dict[str, Any]) -> dict[str, Any] | None:
    """
    Raises:
        RequestError: It is not as OpenAI has it.
    """
    field = "response_format"
    given = without_nulls(given)
    kind = given.get("type")
    known = {"text": ("type",), "json_object": ("type",), "json_schema": ("type", "json_schema")}
    if not isinstance(kind, str) or kind not in known:
        raise RequestError(f"{field}.type must be text, json_object or json_schema, got {kind!r}", field)
    _check_keys(given, known[kind], field)
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    field += ".json_schema"
    inner = given.get("json_schema")
    if not isinstance(inner, dict):
        raise RequestError(f"{field} must be an object with a schema, got {inner!r}", field)
    inner = without_nulls(inner)
    _check_keys(inner, _OF_JSON_SCHEMA, field)
    if not isinstance(inner.get("schema"), dict):
        raise RequestError(f"{field}.schema must be a JSON Schema, got {inner.get('schema')!r}", field)
    return {"json": inner["schema"]}


def _check_keys(given: dict[str, Any], known: tuple[str, ...], field: str) -> None:
    unknown = [name for name in given if name not in known]
    if unknown:
        raise RequestError(f"unknown field: {field}.{unknown[0]}", f"{field}.{unknown[0]}")
