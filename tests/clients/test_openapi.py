"""schemathesis reads /openapi.json, and asks whatever it allows and forbids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agents.scripted_engine import write_model
from tests.api.conftest import API_KEY, start_server
from tests.clients.conftest import PACKAGES

pytestmark = [pytest.mark.slow, pytest.mark.process]

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"

ENGINE = ("--load-format", "dummy", "--max-model-len", "128", "--api-key", API_KEY)
"""What is asked for is answered at once: one layer, and a context that ends soon."""

EXAMPLES = ("--phases", "examples,coverage,fuzzing", "--max-examples", "20", "--generation-deterministic")


def test_schemathesis_finds_no_5xx_and_nothing_undocumented(tmp_path: Path) -> None:
    if not (PACKAGES / "schemathesis").exists():
        pytest.skip("make .clients brings schemathesis")
    model = str(write_model(tmp_path))
    with start_server(tmp_path, "--model", model, *ENGINE) as server:
        server.wait_until_ready()
        result = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
                *("--header", f"Authorization: Bearer {API_KEY}", "--checks", CHECKS, *EXAMPLES),
                *("--workers", "1", "--request-timeout", "600", "--no-color"),
            ],
            # It leaves a directory where it runs.
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(PACKAGES)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stdout + result.stderr
