"""What holds for every test: idle threads do not spin, nothing is written to the user's cache, chance is seeded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# OpenMP reads this when torch loads it. A client, a server and its engine share few cores here: threads that
# spin while they wait would take them from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch


@pytest.fixture(scope="session", autouse=True)
def cache_home() -> Iterator[Path]:
    """An empty cache for this session's engines, those in child processes too."""
    with (
        tempfile.TemporaryDirectory(prefix="llm-engine-tests-") as directory,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("XDG_CACHE_HOME", directory)
        yield Path(directory)


@pytest.fixture(autouse=True)
def seed() -> None:
    """A failure comes again when the test is run again, alone too."""
    torch.manual_seed(0)
