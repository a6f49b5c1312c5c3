"""Clients that people use, each as it comes, against the server with the default model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import API_KEY, ServerProcess, server

__all__ = ["server"]

HERE = Path(__file__).parent
PACKAGES = HERE.parent.parent / ".clients"
"""What `make .clients` installs: beside the tests' own packages, whose versions they do not want."""


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Runs a program of programs/ against the server; returns the JSON that it prints."""

    def run(name: str) -> Any:
        program = HERE / "programs" / name
        if program.suffix == ".mjs":
            if not (PACKAGES / "node_modules").exists() or shutil.which("node") is None:
                pytest.skip("make .clients, and node, bring the clients in JavaScript")
            # Modules are looked up beside the program that imports them.
            shutil.copy(program, PACKAGES / program.name)
            command, environment = ["node", str(PACKAGES / program.name)], {}
        else:
            if not (PACKAGES / "openai").exists():
                pytest.skip("make .clients brings the clients in Python")
            command, environment = [sys.executable, str(program)], {"PYTHONPATH": str(PACKAGES)}
        server: ServerProcess = request.getfixturevalue("server")
        result = subprocess.run(
            [*command, f"{server.url}/v1", API_KEY],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run
