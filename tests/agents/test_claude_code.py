"""Claude Code edits a file, with Anthropic's Messages API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.agents.conftest import Agent
from tests.agents.scripted_engine import agent_server, by_results

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.anyio]

SETTINGS = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_TELEMETRY": "1",
}
"""Its own switches for what it would send to others."""


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


async def test_it_edits_a_file(agent: Agent, tmp_path: Path) -> None:
    (model := tmp_path / "model").mkdir()
    (home := tmp_path / "home").mkdir()
    (work := tmp_path / "work").mkdir()
    (file := work / "hello.txt").write_text("hello world\n")
    script = by_results(
        [
            call("Bash", command="ls", description="Lists the files"),
            "I read it first.\n" + call("Read", file_path=str(file)),
            call("Edit", file_path=str(file), old_string="world", new_string="there"),
            call("Bash", command="cat hello.txt", description="Shows the file"),
            "hello.txt greets whoever is there.",
        ]
    )
    async with agent_server(model, script) as (engine, client):
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
    first, *later = engine.turns
    assert len(later) == 4
    assert "x-anthropic-billing-header" not in first.prompt
    for turn in later:
        assert turn.cached_share >= 0.95
    # What the client counts is what the scheduler found.
    assert said["usage"]["cache_read_input_tokens"] == sum(turn.num_cached_tokens for turn in engine.turns)
