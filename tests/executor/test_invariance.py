"""One answer on every kernel and any number of threads, and the weights' own: also that of the default model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.kernels import cpu
from engine.loading.resolve import resolve_model
from engine.quality.invariants import Trial, digests, readable
from engine.selftest import digests_elsewhere
from tests.helpers.digests import configurations
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="torch's operators promise less")

Digests = dict[str, list[str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models: sizes that fill no vector, and norms of heads with a window."""
    directory = tmp_path_factory.mktemp("levels")
    for family in ("smollm2", "gemma3"):
        config = deepcopy(TINY_CONFIGS[family])
        config.max_position_embeddings = 512
        write_checkpoint(directory / family, config)
    return directory


@pytest.fixture(scope="module")
def alone(models: Path) -> dict[str, Digests]:
    """Each request alone, on this process's kernels and one thread."""
    expected = {}
    for name, config in configurations(models).items():
        trial = Trial(replace(config, num_threads=1), Path(config.model))
        expected[name] = readable(trial.alone.run_alone(trial.arrivals))
    return expected


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_every_kernel_brings_the_same(models: Path, alone: dict[str, Digests], level: str) -> None:
    """Requests in company, on two threads."""
    missing = cpu.LEVELS[level].needs - cpu.processor_flags()
    if missing:
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    command = [sys.executable, "-m", "tests.helpers.digests", str(models)]
    output = subprocess.run(
        command, env={**os.environ, cpu.VARIABLE: level}, stdout=subprocess.PIPE, check=True
    )
    found = json.loads(output.stdout)
    assert found["level"] == level
    for name, expected in alone.items():
        results = found["results"][name]
        assert sum(key.count(" ") == 2 for key in results) > 20
        for key, values in results.items():
            assert expected[key][: len(values)] == values, f"{name}, {key}"


@pytest.mark.parametrize("quant", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_the_default_model_on_the_least_kernels(quant: str) -> None:
    config = EngineConfig.from_options(model="llama", quant=quant, device="cpu")
    here = digests(config, resolve_model("llama"))
    options = ["--model", "llama", "--quant", quant, "--device", "cpu", "--num-threads", "1"]
    assert (
        digests_elsewhere(options, "avx2" if cpu.LEVELS["avx2"].needs <= cpu.processor_flags() else None)
        == here
    )
