"""Codex CLI edits a file in five turns, and most of what it sends again each turn is in the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.agents.conftest import Agent
from tests.agents.scripted_engine import agent_server, by_results

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.anyio]

CACHED_SHARE = 0.95
"""Of a prompt from the second turn on."""

CONFIG = """
model = "scripted"
model_provider = "here"
model_catalog_json = "{catalog}"
approval_policy = "never"
sandbox_mode = "danger-full-access"
check_for_update_on_startup = false

[model_providers.here]
name = "here"
base_url = "{url}"
wire_api = "responses"
env_key = "HERE_API_KEY"

[analytics]
enabled = false

[feedback]
enabled = false

[features]
apps = false
plugins = false
"""


def shell(command: str) -> str:
    call = {"name": "exec_command", "arguments": {"cmd": command}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


PATCH = """*** Begin Patch
*** Update File: greeting.py
@@
-print("Good mornin")
+print("Good morning, κόσμε 🌍")
*** End Patch
"""

SCRIPT = [
    f"I look at what is there.\n{shell('ls')}",
    shell("cat greeting.py"),
    f'<tool_call>\n{{"name": "apply_patch"}}\n{PATCH}</tool_call>',
    shell("python3 greeting.py"),
    "The greeting is whole again.",
]


async def test_it_edits_a_file(tmp_path: Path, agent: Agent) -> None:
    model, home, work = (tmp_path / name for name in ("model", "home", "work"))
    for directory in (model, home, work):
        directory.mkdir()
    (work / "greeting.py").write_text('print("Good mornin")\n')
    async with agent_server(model, by_results(SCRIPT)) as (engine, client):
        catalog = home / "models.json"
        catalog.write_text((await client.get("/v1/models")).text)
        config = CONFIG.format(catalog=catalog, url=client.base_url.join("/v1"))
        (home / "config.toml").write_text(config)
        output = await agent(
            "codex",
            *("exec", "--strict-config", "--skip-git-repo-check", "--json", "Mend the greeting."),
            cwd=work,
            environment={"CODEX_HOME": str(home), "HOME": str(home), "HERE_API_KEY": "none"},
        )
    assert (work / "greeting.py").read_text() == 'print("Good morning, κόσμε 🌍")\n'
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert events[-2]["item"]["text"] == SCRIPT[-1]
    assert not [event for event in events if event.get("item", {}).get("type") == "error"]
    assert len(engine.turns) == len(SCRIPT)
    assert "Good morning, κόσμε 🌍" in engine.turns[-1].prompt.rpartition("<tool_response>")[2]
    for turn in engine.turns[1:]:
        assert turn.cached_share >= CACHED_SHARE
    assert events[-1]["usage"]["cached_input_tokens"] == sum(turn.num_cached_tokens for turn in engine.turns)
    assert events[-1]["usage"]["input_tokens"] == sum(turn.num_prompt_tokens for turn in engine.turns)
