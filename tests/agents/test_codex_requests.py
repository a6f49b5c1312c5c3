"""What Codex CLI sent when it edited a file, shortened, is answered as it was then: without Codex."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent

from tests.agents.scripted_engine import agent_server, by_results
from tests.agents.test_codex import SCRIPT
from tests.helpers.strict import parse_strictly

pytestmark = [pytest.mark.process, pytest.mark.anyio]

RECORDED = json.loads((Path(__file__).parent / "requests" / "codex.json").read_text())


async def test_they_are_answered(tmp_path: Path) -> None:
    body = RECORDED["body"]
    async with agent_server(tmp_path, by_results(SCRIPT)) as (engine, client):
        for num_items in RECORDED["num_items"]:
            answer = await client.post("/v1/responses", json={**body, "input": body["input"][:num_items]})
            events = [
                json.loads(line.removeprefix("data: "))
                for line in answer.text.splitlines()
                if line.startswith("data: ")
            ]
            for event in events:
                parse_strictly(event, ResponseStreamEvent)
            assert events[-1]["type"] == "response.completed"
            response = events[-1]["response"]
            check_output(response["output"], body["input"][num_items:])
            turn = engine.turns[-1]
            assert response["usage"]["input_tokens"] == turn.num_prompt_tokens
            assert response["usage"]["input_tokens_details"]["cached_tokens"] == turn.num_cached_tokens
            if len(engine.turns) > 1:
                # All but what the last answer and its result have added.
                assert turn.num_cached_tokens > engine.turns[-2].num_prompt_tokens - 16
    assert response["output"][0]["content"][0]["text"] == SCRIPT[-1]


def check_output(output: list[dict[str, Any]], following: list[dict[str, Any]]) -> None:
    """Codex sent the answer back with its next request, where there was one."""
    for item, sent in zip(output, following, strict=False):
        for name in ("type", "role", "name", "arguments", "input"):
            assert item.get(name) == sent.get(name)


async def test_without_a_model_to_say_something(tmp_path: Path) -> None:
    """As a client asks whether there is such an endpoint."""
    async with agent_server(tmp_path, lambda prompt: "Hello") as (_, client):
        body = {**RECORDED["body"], "input": [], "max_output_tokens": 1, "stream": False}
        answer = await client.post("/v1/responses", json=body)
    assert answer.status_code == 200
    assert answer.json()["status"] == "incomplete"
