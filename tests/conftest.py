"""What holds for every test: marks by place, compiled kernels that sessions share, idle threads, seeded chance."""

from __future__ import annotations

import fcntl
import os
import tempfile
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A slow machine is no fault of what is tested.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# OpenMP reads this when torch loads it. A client, a server and its engine share few cores here: threads that
# spin while they wait would take them from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

TESTS = Path(__file__).parent

COMPILED = TESTS.parent / ".test-cache"
"""What compilers made for tests, by hashes of source, compiler and options; `make clean` removes it."""

LONG = ("test_soak", "test_exactness")
"""Modules whose tests take a minute each."""

MARKS_OF_FIXTURES = {"server": "process", "cluster": "process", "compiler": "compile"}
MARKS_OF_FOLDERS = {"executor/ranks": "process", "interpreted": "interpreted"}
"""Marks that follow from what a test uses or where it is; other modules set `pytestmark`."""


def take_one_core(worker: str) -> None:
    """Gives a process of pytest-xdist a core: what takes as many threads as there are cores has one."""
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


take_one_core(os.environ.get("PYTEST_XDIST_WORKER", ""))

import torch  # noqa: E402  (counts the cores)


def pytest_configure(config: pytest.Config) -> None:
    """An empty cache for this session's engines, those in child processes too, but for compiled kernels."""
    home = tempfile.TemporaryDirectory(prefix="llm-engine-tests-")
    config.add_cleanup(home.cleanup)
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    patch.setenv("XDG_CACHE_HOME", home.name)
    (COMPILED / "kernels").mkdir(parents=True, exist_ok=True)
    (Path(home.name) / "llm-engine").mkdir()
    (Path(home.name) / "llm-engine" / "kernels").symlink_to(COMPILED / "kernels")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        # Once, before the processes start that would each build them, here or in a session beside this one.
        from engine.kernels import cpu

        with (COMPILED / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cpu.library()
        cpu.library.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests, and has the longest come first: at the end no process waits for another's."""
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in MARKS_OF_FIXTURES:
                item.add_marker(MARKS_OF_FIXTURES[fixture])
        place = item.path.relative_to(TESTS).as_posix()
        for folder, mark in MARKS_OF_FOLDERS.items():
            if place.startswith(f"{folder}/"):
                item.add_marker(mark)
    items.sort(key=lambda item: item.get_closest_marker("compile") is None and item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def seed() -> None:
    """A failure comes again when the test is run again, alone too."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's heads, vocabulary and tokenizer, tiny otherwise, and random: for tests to which it is the same what a
    model says."""
    from engine.loading.resolve import resolve_model
    from engine.tokenizer.files import read_tokenizer
    from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

    path = tmp_path_factory.mktemp("small")
    config = deepcopy(TINY_CONFIGS["smollm2"])
    config.vocab_size, config.max_position_embeddings = 49152, 8192
    config.intermediate_size = 96  # is shared by three, too
    write_checkpoint(path, config)
    tokenizer, _ = read_tokenizer(resolve_model("llama"))
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has engines of this process fork their ranks: see `tests.helpers.forked_ranks`."""
    from tests.helpers.forked_ranks import ForkLauncher, start_server

    start_server()
    monkeypatch.setattr("engine.executor.ranks.ranks.ProcessLauncher", ForkLauncher)
