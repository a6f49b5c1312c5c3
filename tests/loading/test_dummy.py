"""Random weights for a config.json: the engine runs, the logits are finite, and nothing but a config is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.core.batch import Batch, BatchRow
from engine.errors import CheckpointError
from engine.executor.runner import ModelRunner
from engine.loading.dummy import DummyCheckpoint
from tests.helpers.paged import DRAW
from tests.helpers.tiny import TINY_CONFIGS

QUANTS = ["none", "int8", "int4:g128"]


def config_only(path: Path, family: str) -> Path:
    TINY_CONFIGS[family].save_pretrained(path)
    assert {file.name for file in path.iterdir()} <= {"config.json", "generation_config.json"}
    return path


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize("quant", QUANTS)
def test_logits_are_finite_and_differ(tmp_path: Path, family: str, quant: str) -> None:
    path = config_only(tmp_path, family)
    config = EngineConfig(model=str(path), load_format="dummy", kv_cache_memory="4MiB", quant=quant)
    runner = ModelRunner(config, DummyCheckpoint(path))
    logits = runner.execute(Batch([BatchRow(list(range(20)), 0, 0, [1, 2], DRAW)]))
    assert logits.isfinite().all()
    assert 0.05 < logits.std() < 50


def test_weights_are_made_as_they_are_stored(tmp_path: Path) -> None:
    """No step of making them holds a weight in a wider type: a model of many GB has no room for that."""
    path = config_only(tmp_path, "llama")
    made: list[torch.dtype] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if (
                isinstance(result, torch.Tensor)
                and result.numel() >= 64 * 64
                and result.device.type != "meta"
            ):
                made.append(result.dtype)
            return result

    config = EngineConfig(model=str(path), load_format="dummy", quant="int8", kv_cache_memory="4MiB")
    runner = ModelRunner(config, DummyCheckpoint(path))
    with Watch():
        runner.model.randomize(torch.device("cpu"))
    assert set(made) == {torch.int8}


def test_generates_from_a_config_alone(tmp_path: Path) -> None:
    path = config_only(tmp_path, "llama")
    llm = LLM(str(path), load_format="dummy", quant="int8", kv_cache_memory="4MiB")
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    results = llm.generate(["abc", [7, 8, 9]], params, use_tqdm=False)
    assert [len(result.outputs[0].token_ids) for result in results] == [5, 5]
    assert len(results[0].prompt_token_ids) == 3


def test_weights_that_were_not_loaded_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="load_format is dummy"):
        DummyCheckpoint(config_only(tmp_path, "llama")).tensor("model.norm.weight")
