"""Agents that people use, each as npm brings it, headless, with no other traffic than to the server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent.parent.parent / ".agents"
"""What `make agents` installs, by the versions in package.json."""

Agent = Callable[..., Awaitable[str]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def agent() -> Agent:
    """Runs a program of PACKAGES in a directory; returns what it prints."""

    async def run(name: str, *arguments: str, cwd: Path, environment: Mapping[str, str]) -> str:
        program = PACKAGES / "node_modules" / ".bin" / name
        if not program.exists():
            pytest.skip("make agents brings the agents")
        process = await asyncio.create_subprocess_exec(
            str(program),
            *arguments,
            cwd=cwd,
            # Nothing of this machine's user, whose settings and keys are none of the test's.
            env={"PATH": f"{program.parent}:{os.environ['PATH']}", **environment},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            output, errors = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 0, f"{output.decode()}\n{errors.decode()}"
        return output.decode()

    return run
