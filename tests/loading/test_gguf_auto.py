"""GGUF under `--quant auto`: eight bits in groups of 32, which hold most types to the bit."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Type

from engine.config import EngineConfig
from engine.executor.runner import ModelRunner
from engine.loading.checkpoint import open_checkpoint
from engine.models.config import ModelConfig
from engine.models.modules import module_names
from engine.quant.int8_groups import Int8Groups
from engine.quant.weight import to_float
from engine.quant_spec import EMBEDDING, LM_HEAD
from tests.helpers.gguf_file import write_gguf_model
from tests.helpers.paged import make_sequences, run_chunks
from tests.helpers.tiny import TINY_CONFIGS
from tests.models.test_quantized_models import relative_error

CHUNKS = [[26, 1], [7, 12, 1]]
DOWN = "model.layers.0.mlp.down_proj"


def write(path: Path, kind: Type | None, kinds: dict[str, Type] | None = None, **changes: Any) -> Path:
    config = deepcopy(TINY_CONFIGS["llama"])
    config.intermediate_size = 96
    for name, value in changes.items():
        setattr(config, name, value)
    write_gguf_model(path / "model.gguf", config, kind, kinds)
    return path / "model.gguf"


def runner_of(path: Path, quant: str = "auto", **options: Any) -> ModelRunner:
    config = EngineConfig(
        model=str(path), quant=quant, kv_cache_memory="1MiB", cache_dir=str(path.parent / "cache"), **options
    )
    return ModelRunner(config, open_checkpoint(path))


def schemes(path: Path) -> dict[str, str]:
    checkpoint = open_checkpoint(path)
    quant_spec = runner_of(path).config.quant_spec
    modules = module_names(ModelConfig.from_dict(checkpoint.config))
    return {module: str(quant_spec.of(module)) for module in modules}


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q5_0, Type.Q8_0], ids=lambda kind: kind.name)
def test_the_numbers_are_those_of_the_file(kind: Type, tmp_path: Path) -> None:
    path = write(tmp_path, kind)
    found = schemes(path)
    assert found.pop(EMBEDDING) == "int8"
    assert set(found.values()) == {"int8:g32"}
    weight = open_checkpoint(path).tensor(f"{DOWN}.weight")
    stored = Int8Groups(32).quantize(weight)
    values = stored["weight"].float() * stored["scale"].float().repeat_interleave(32, dim=1)
    assert torch.equal(values, to_float(weight))


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_1, Type.Q8_0], ids=lambda kind: kind.name)
def test_logits_are_near_those_of_its_floats(kind: Type, tmp_path: Path) -> None:
    path = write(tmp_path, kind)
    cache = {"kv_cache_dtype": "float32"}
    computed, expected = (
        run_chunks(runner_of(path, quant, **cache), make_sequences(320, CHUNKS), CHUNKS)
        for quant in ("auto", "none")
    )
    for one, other in zip(computed, expected, strict=True):
        logits, floats = (torch.stack(list(rows.values())) for rows in (one, other))
        # What activations of eight bits cost with such weights; two terms of them make it 0.0005.
        assert relative_error(logits, floats) < 0.1


def test_floats_stay_floats(tmp_path: Path) -> None:
    assert set(schemes(write(tmp_path, None)).values()) == {"none"}


def test_modules_of_floats_and_those_that_share_their_product(tmp_path: Path) -> None:
    found = schemes(write(tmp_path, Type.Q8_0, {"blk.1.attn_k": Type.F16, "blk.2.ffn_down": Type.F32}))
    layers = {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"} | {"model.layers.2.mlp.down_proj"}
    assert {module for module, words in found.items() if words == "none"} == layers


@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0], ids=lambda kind: kind.name)
def test_a_table_and_the_head_that_is_tied_to_it(kind: Type, tmp_path: Path) -> None:
    found = schemes(write(tmp_path, Type.Q8_0, {"token_embd": kind}, tie_word_embeddings=True))
    expected = ("none", "none") if kind == Type.F16 else ("int8", "int8:g32")
    assert (found[EMBEDDING], found[LM_HEAD]) == expected


def test_what_is_rounded_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, Type.Q8_0, {"ffn_down": Type.Q4_1, "attn_v": Type.Q5_1})
    runner_of(path, "none")
    assert not caplog.records
    runner_of(path)
    assert "matrices of Q4_1 (3), Q5_1 (3) run as int8:g32" in caplog.text


@pytest.mark.parametrize("quant", ["none", "int8", "int4"])
def test_other_choices_are_as_they_were(quant: str, tmp_path: Path) -> None:
    found = str(runner_of(write(tmp_path, Type.Q8_0), quant).config.quant_spec)
    assert found.partition(":")[0] == quant
