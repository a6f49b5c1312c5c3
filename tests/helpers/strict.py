"""Bodies parsed with the types of a client's package, and nothing in them that these do not know."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter

Kind = TypeVar("Kind")


def parse_strictly(value: Any, kind: type[Kind]) -> Kind:
    """`value`, as JSON has it, as a `kind`; fails where that lacks a member, or has none for what is there."""
    parsed = TypeAdapter(kind).validate_python(value)
    _check(parsed, "$")
    return parsed


def _check(value: Any, path: str) -> None:
    if isinstance(value, BaseModel):
        assert not value.model_extra, f"{path}: {type(value).__name__} knows no {set(value.model_extra)}"
        for name, member in value:
            _check(member, f"{path}.{name}")
    elif isinstance(value, list):
        for index, member in enumerate(value):
            _check(member, f"{path}[{index}]")
