"""Answers in a form through the clients that programs use; the small model says nonsense, in the right form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

pytestmark = pytest.mark.slow


class Event(BaseModel):
    """A meeting."""

    name: str = Field(max_length=20)
    day: Literal["Monday", "Sunday"]
    guests: list[Literal["Ann", "Bob", "Zoë"]] = Field(max_length=3)


def test_openai(run: Callable[[str], Any]) -> None:
    said = run("openai_structured.py")
    Event.model_validate(said["whole"])
    assert said["streamed"] == said["whole"]


def test_langchain(run: Callable[[str], Any]) -> None:
    said = run("langchain_structured.py")
    Event.model_validate(said["whole"])
    assert said["streamed"] == said["whole"]
    assert isinstance(said["any"], dict)


def test_instructor(run: Callable[[str], Any]) -> None:
    said = run("instructor_structured.py")
    Event.model_validate(said["schema"])
    assert isinstance(said["any"], dict)


def test_llama_index(run: Callable[[str], Any]) -> None:
    said = run("llama_index_structured.py")
    for answer in said.values():
        Event.model_validate(answer)
