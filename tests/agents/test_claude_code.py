"""Claude Code edits a file, with Anthropic's Messages API: itself, and its requests as they were recorded.

The recorded ones are of version 2.1.332, with texts cut short and nothing of who made them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.agents.conftest import Agent
from tests.agents.scripted_engine import Turn, agent_server, by_results
from tests.api.anthropic.test_messages import check_order, read_events

pytestmark = [pytest.mark.process, pytest.mark.anyio]

RECORDED = Path(__file__).parent / "requests" / "claude_code.json"

SETTINGS = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}
"""Its own switches for what it would send to others."""


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def edits(file: Path) -> list[str]:
    """What the model says, turn for turn."""
    return [
        call("Bash", command="ls", description="Lists the files"),
        "I read it first.\n" + call("Read", file_path=str(file)),
        call("Edit", file_path=str(file), old_string="world", new_string="there"),
        call("Bash", command="cat hello.txt", description="Shows the file"),
        "hello.txt greets whoever is there.",
    ]


def check_cached(turns: list[Turn]) -> None:
    """All but the last words of a prompt are found in the cache, from the second on."""
    assert len(turns) == 5
    assert turns[0].num_cached_tokens == 0
    for turn in turns[1:]:
        assert turn.cached_share >= 0.95


async def test_its_requests_are_answered(tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text())
    messages = []
    async with agent_server(tmp_path, by_results(edits(Path("/home/user/project/hello.txt")))) as (
        engine,
        client,
    ):
        for number, body in enumerate(recorded["bodies"]):
            header = body["system"][0]
            header["text"] += f" cch={number};"
            body["tools"] = recorded["tools"]
            response = await client.post(recorded["path"], json=body, headers=recorded["headers"])
            messages.append(read_events(response.text))
        metrics = (await client.get("/metrics")).text
    for events in messages:
        check_order([event["type"] for event in events])
    kinds = [
        [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
        for events in messages
    ]
    assert kinds == [["tool_use"], ["text", "tool_use"], ["tool_use"], ["tool_use"], ["text"]]
    usages = [events[-2]["usage"] for events in messages]
    assert [usage["cache_read_input_tokens"] for usage in usages] == [
        turn.num_cached_tokens for turn in engine.turns
    ]
    check_cached(engine.turns)
    for turn in engine.turns:
        assert "billing" not in turn.prompt
        # After the question, where it was, and not before it.
        assert turn.prompt.index("# Environment") > turn.prompt.index("Change world to there")
        assert "DeferredToolPlaceholder" not in turn.prompt
    assert "engine_unknown_request_members_total{" not in metrics


@pytest.mark.slow
async def test_it_edits_a_file(agent: Agent, tmp_path: Path) -> None:
    (model := tmp_path / "model").mkdir()
    (home := tmp_path / "home").mkdir()
    (work := tmp_path / "work").mkdir()
    (file := work / "hello.txt").write_text("hello world\n")
    async with agent_server(model, by_results(edits(file))) as (engine, client):
        environment = {
            "HOME": str(home),
            "ANTHROPIC_BASE_URL": str(client.base_url),
            "ANTHROPIC_API_KEY": "dummy",
            "ANTHROPIC_MODEL": "scripted",
            **SETTINGS,
        }
        printed = await agent(
            "claude", "-p", "Change world to there in hello.txt.", "--allowedTools", "Bash,Edit,Read",
            "--output-format", "json", cwd=work, environment=environment,
        )  # fmt: skip
    assert file.read_text() == "hello there\n"
    said = json.loads(printed)
    assert said["result"] == "hello.txt greets whoever is there."
    assert not said["is_error"]
    check_cached(engine.turns)
    assert "x-anthropic-billing-header" not in engine.turns[0].prompt
    # What the client counts is what the scheduler found.
    assert said["usage"]["cache_read_input_tokens"] == sum(turn.num_cached_tokens for turn in engine.turns)
