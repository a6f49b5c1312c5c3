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


def skip_without(name: str) -> None:
    """Skips the test unless what a program of programs/ imports is there."""
    if name.endswith(".mjs"):
        if not (PACKAGES / "node_modules").exists() or shutil.which("node") is None:
            pytest.skip("make .clients, and node, bring the clients in JavaScript")
    elif not (PACKAGES / "openai").exists():
        pytest.skip("make .clients brings the clients in Python")


def run_program(name: str, server: ServerProcess, *arguments: str) -> Any:
    """Runs a program of programs/ against the server; returns the JSON that it prints.

    Args:
        arguments: What it is given after the server's address and key.
    """
    program = HERE / "programs" / name
    if program.suffix == ".mjs":
        # Modules are looked up beside the program that imports them.
        shutil.copy(program, PACKAGES / program.name)
        command, environment = ["node", str(PACKAGES / program.name)], {}
    else:
        command, environment = [sys.executable, str(program)], {"PYTHONPATH": str(PACKAGES)}
    result = subprocess.run(
        [*command, f"{server.url}/v1", API_KEY, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Runs a program of programs/ against the server that all tests share."""

    def run(name: str) -> Any:
        skip_without(name)
        return run_program(name, request.getfixturevalue("server"))

    return run
