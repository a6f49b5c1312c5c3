"""Tools through the clients that programs use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

pytestmark = [pytest.mark.slow, pytest.mark.process]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def check(arguments: dict[str, Any]) -> None:
    Weather.model_validate(arguments)


def test_langchain(run: Callable[[str], Any]) -> None:
    said = run("langchain_tools.py")
    check(said["structured"])
    for name in ("bound", "required"):
        check(said[name])
    assert said["streamed"] == said["bound"]
    assert said["is_answered"]


def test_instructor(run: Callable[[str], Any]) -> None:
    said = run("instructor_tools.py")
    check(said["whole"])
    assert said["streamed"] == said["whole"]


def test_llama_index(run: Callable[[str], Any]) -> None:
    said = run("llama_index_tools.py")
    check(said["predicted"])
    assert said["called"]["city"] in ("Paris", "Rome")


def test_ai_sdk_and_openais_tool_runner(run: Callable[[str], Any]) -> None:
    said = run("ai_sdk_tools.mjs")
    check(said["called"])
    assert said["result"] == f"Rain in {said['called']['city']}."
    assert said["streamed"] == said["called"]
    assert said["object"]["city"] in ("Paris", "Rome")
    assert said["given"]["city"] in ("Paris", "Rome")
