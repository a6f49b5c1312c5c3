"""The engine that agents are tried against is one, but for what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agents.scripted_engine import agent_server, by_results

pytestmark = [pytest.mark.process, pytest.mark.anyio]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city. " * 40,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


async def test_a_script_is_said_and_its_prompts_are_cached(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "How is the weather?"}]
    async with agent_server(tmp_path, by_results([CALL, "It rains."])) as (engine, client):
        body = {"model": "scripted", "messages": messages, "tools": [TOOL]}
        first = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
        (call,) = first["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
        messages += [first, {"role": "tool", "tool_call_id": call["id"], "content": "rain"}]
        second = (await client.post("/v1/chat/completions", json=body)).json()
    assert second["choices"][0]["message"]["content"] == "It rains."
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == engine.turns[1].num_cached_tokens
    assert engine.turns[0].num_cached_tokens == 0
    # What was said before is there to the block's end.
    assert engine.turns[1].num_cached_tokens > engine.turns[0].num_prompt_tokens - 16


async def test_a_script_cannot_say_what_the_form_forbids(tmp_path: Path) -> None:
    async with agent_server(tmp_path, by_results(["Paris"])) as (_, client):
        messages = [{"role": "user", "content": "How is the weather?"}]
        form = {"type": "json_object"}
        response = await client.post(
            "/v1/chat/completions", json={"messages": messages, "response_format": form}
        )
    assert response.status_code == 500
    assert "not allowed by the form" in response.json()["error"]["message"]
