"""schemathesis reads /openapi.json, and asks whatever it allows and forbids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.conftest import API_KEY, ServerProcess
from tests.clients.conftest import PACKAGES

pytestmark = [pytest.mark.slow, pytest.mark.process]

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_schemathesis_finds_no_5xx_and_nothing_undocumented(server: ServerProcess, tmp_path: Path) -> None:
    if not (PACKAGES / "schemathesis").exists():
        pytest.skip("make .clients brings schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {API_KEY}", "--checks", CHECKS, "--max-examples", "30"]
    # Long answers take their time.
    command += ["--request-timeout", "600", "--seed", "1", "--no-color"]
    result = subprocess.run(
        command,
        # It leaves a directory where it runs.
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
