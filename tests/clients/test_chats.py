"""Plain answers, whole and streamed, through the clients that programs use: each says what the others say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.process]

COLOURS = ({"colour": "red"}, {"colour": "blue"})


def test_litellm(run: Callable[[str], Any]) -> None:
    said = run("litellm_chat.py")
    assert said["called"] in COLOURS
    assert said["text"]
    [answer] = {said[kind + way] for kind in ("openai", "anthropic", "bridged") for way in ("", " streamed")}
    assert answer


def test_llm(run: Callable[[str], Any]) -> None:
    said = run("llm_chat.py")
    assert said["formed"] in COLOURS
    assert said["streamed"] == said["plain"] != ""
    assert said["second"]


def test_llama_index(run: Callable[[str], Any]) -> None:
    said = run("llama_index_chat.py")
    for kind in ("chat", "completion"):
        assert said[f"{kind} streamed"] == said[kind] != ""


def test_responses_of_openais_client_for_node_and_of_the_ai_sdk(run: Callable[[str], Any]) -> None:
    said = run("node_responses.mjs")
    [answer] = {said[name] for name in ("whole", "deltas", "final", "kept", "said", "streamed")}
    assert answer
    assert said["next"]
    assert said["previous"]
    assert said["called"] in COLOURS
    assert said["result"] == f"It is {said['called']['colour']}."
    assert said["object"] in COLOURS
