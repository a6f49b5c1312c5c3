"""What /openapi.json says: every route with its types, which are those that bodies are decoded by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, get_type_hints

import msgspec

from api.errors import error_shape
from api.protocol import NEUTRAL_VALUES
from api.routing import EndpointRoute
from api.service import VERSION
from engine.core.sampling_params import SAMPLING_PARAMETERS, Range

_SCHEMAS = "#/components/schemas/{name}"
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}


@dataclass(frozen=True, slots=True)
class Operation:
    """What a route does.

    Attributes:
        body: Types that the request's body may have.
        answer: The type of the answer; None: no JSON.
        chunk: The type of the events of an answer that is streamed; None: none is.
        media_type: The answer's.
        errors: Statuses of the errors that it answers with, besides those that any may end in.
        neutral_values: By field of the body, the only values that it may have.
    """

    summary: str
    body: Sequence[type] = ()
    answer: type | None = None
    chunk: type | None = None
    media_type: str = "application/json"
    errors: Sequence[int] = ()
    neutral_values: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: NEUTRAL_VALUES)

    @property
    def types(self) -> list[type]:
        return [one for one in (*self.body, self.answer, self.chunk) if one is not None]


BODY_ERRORS = (400, 404, 413, 415, 429, 503)
"""Statuses of the errors of routes that read a body with a model's name."""

ANSWER_ERRORS = (*BODY_ERRORS, 408)
"""The same where the engine computes something, which may take longer than the request allows."""


def openapi(routes: Iterable[Any], open_paths: Sequence[str], has_key: bool, extra: Iterable[type]) -> bytes:
    """The document, as JSON.

    Args:
        routes: The application's.
        open_paths: What needs no key.
        has_key: Whether the others do.
        extra: Types that fields speak of by their names.
    """
    described = [(route, route.operation) for route in routes if isinstance(route, EndpointRoute)]
    errors = {route.path: get_type_hints(error_shape(route.path))["return"] for route, _ in described}
    types = [one for _, operation in described for one in operation.types]
    used = list(dict.fromkeys([*types, *errors.values(), *extra]))
    schemas, components = msgspec.json.schema_components(used, ref_template=_SCHEMAS)
    neutral = {body.__name__: one.neutral_values for _, one in described for body in one.body}
    for name, component in components.items():
        _limit(component, neutral.get(name, {}))
    schema_of = dict(zip(used, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route, operation in described:
        path = route.path_format.replace(":path", "")
        needs_key = has_key and route.path not in open_paths
        for method in sorted(route.methods or ()):
            paths.setdefault(path, {})[method.lower()] = _operation(
                operation, route, method, needs_key, schema_of, errors[route.path]
            )
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "LLM engine", "version": VERSION},
        "paths": paths,
        "components": {"schemas": components},
    }
    if has_key:
        document["components"]["securitySchemes"] = _SECURITY
    return msgspec.json.encode(document)


def _operation(
    operation: Operation,
    route: EndpointRoute,
    method: str,
    needs_key: bool,
    schema_of: dict[type, Any],
    error: type,
) -> dict[str, Any]:
    said: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{method.lower()}_{route.name}",
        "responses": {"200": {"description": "the answer", "content": _answers(operation, schema_of)}},
    }
    if operation.body:
        bodies = [schema_of[one] for one in operation.body]
        schema = bodies[0] if len(bodies) == 1 else {"oneOf": bodies}
        said["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if route.param_convertors:
        said["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in route.param_convertors
        ]
    if needs_key:
        said["security"] = [{name: []} for name in _SECURITY]
    for status in sorted({*operation.errors, 500, *((401,) if needs_key else ())}):
        said["responses"][str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": schema_of[error]}},
        }
    return said


def _answers(operation: Operation, schema_of: dict[type, Any]) -> dict[str, Any]:
    """By media type, what the answer may be."""
    schema = {"type": "string"} if operation.answer is None else schema_of[operation.answer]
    answers = {operation.media_type: {"schema": schema}}
    if operation.chunk is not None:
        # Those of no type are objects, each with a type of its own.
        name = schema_of[operation.chunk].get("$ref", "object").rpartition("/")[2]
        end = "" if name == "object" else ", then [DONE]"
        description = f"events whose data is each one {name}{end}"
        answers["text/event-stream"] = {"schema": {"type": "string", "description": description}}
    return answers


def _limit(component: dict[str, Any], neutral_values: Mapping[str, tuple[Any, ...]]) -> None:
    """Adds the ranges of sampling parameters to the fields that have their names, and what some fields may hold."""
    for name in neutral_values.keys() & component.get("properties", {}).keys():
        component["properties"][name] = {"enum": [*neutral_values[name], None], "default": None}
    for parameter in SAMPLING_PARAMETERS:
        field = component.get("properties", {}).get(parameter.name, {})
        for one in field.get("anyOf", ()):
            if one.get("type") in ("integer", "number") and parameter.limits is not None:
                one.update(_bounds(parameter.limits))
    # An older way to say 0.
    for one in component.get("properties", {}).get("top_k", {}).get("anyOf", ()):
        if one.get("type") == "integer":
            one["minimum"] = -1


def _bounds(limits: Range) -> dict[str, float]:
    bounds = {"minimum": limits.low, "maximum": limits.high}
    return {name: bound for name, bound in bounds.items() if bound is not None}
