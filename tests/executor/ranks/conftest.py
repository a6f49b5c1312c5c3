"""The process that ranks of small tests are forked from is there before any of them, and stays."""

from __future__ import annotations

import pytest

from tests.helpers.forked_ranks import start_server


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    start_server()
