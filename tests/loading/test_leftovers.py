"""Tensors that the model has no place for: refused by name, unless leaving them out changes nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.executor.runner import ModelRunner
from engine.loading.checkpoint import open_checkpoint
from engine.loading.model_config import read_model_config
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.linear import Linear
from engine.models.norm import RMSNorm
from engine.models.shapes import tensor_names
from engine.parallel.group import TensorGroup
from engine.parallel.pipeline import Pipeline
from engine.quant.plan import QuantizationPlan
from engine.quant_spec import parse_quant_spec
from tests.helpers import tiny
from tests.helpers.tiny import TINY_CONFIGS

LAYER = "model.layers.0"


def write_checkpoint(path: Path, family: str) -> Path:
    tiny.write_checkpoint(path, TINY_CONFIGS[family])
    return path


def add(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """Adds tensors to a checkpoint, and keys to its config.json."""
    file = path / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})
    old = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**old, **config}))
    return path


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_names_are_those_that_the_layers_read(family: str) -> None:
    config = ModelConfig.from_dict(TINY_CONFIGS[family].to_dict())
    plan = QuantizationPlan(parse_quant_spec("none"), torch.float32)
    decoder = Decoder(config, plan, torch.float32, TensorGroup(), Pipeline())
    modules = list(decoder.modules())
    layers = [module for module in modules if isinstance(module, Linear)]
    read = {f"{module.source}.weight" for module in modules if isinstance(module, RMSNorm)}
    read |= {f"{source}.weight" for layer in layers for source in layer.sources}
    read |= {f"{source}.bias" for layer in layers if layer.has_bias for source in layer.sources}
    assert read == tensor_names(config)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_a_bias_that_the_configuration_does_not_name(family: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, family)
    add(path, {f"{LAYER}.self_attn.q_proj.bias": torch.ones(128)})
    with pytest.raises(CheckpointError, match=r"no place for 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        read_model_config(open_checkpoint(path))


def test_several_are_named_and_counted(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama")
    add(path, {f"{LAYER}.extra{index}.weight": torch.ones(2) for index in range(5)})
    with pytest.raises(CheckpointError, match=r"extra0.*extra1.*extra2.weight' and 2 more"):
        read_model_config(open_checkpoint(path))


def test_layers_beyond_the_configuration(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama")
    add(path, {}, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\."):
        read_model_config(open_checkpoint(path))


def test_what_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_checkpoint(tmp_path, "llama")
    with caplog.at_level(logging.WARNING):
        before = read_model_config(open_checkpoint(path))
        add(
            path,
            {
                f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.ones(8),
                f"{LAYER}.self_attn.masked_bias": torch.tensor(-1e9),
                f"{LAYER}.self_attn.q_proj.bias": torch.zeros(64),
            },
        )
        assert read_model_config(open_checkpoint(path)) == before
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("vision_tower.blocks.0.weight", {}, "other modalities"),
        ("model.multi_modal_projector.linear.weight", {}, "other modalities"),
        ("mtp.layers.0.input_proj.weight", {}, "multi-token prediction"),
        ("model.mtp_layers.0.input_proj.weight", {}, "multi-token prediction"),
        ("model.layers.3.eh_proj.weight", {"num_nextn_predict_layers": 1}, "multi-token prediction"),
        (f"{LAYER}.self_attn.k_proj.k_scale", {}, "quantized KV cache"),
        (f"{LAYER}.self_attn.v_scale", {}, "quantized KV cache"),
    ],
)
def test_what_a_text_model_can_do_without_is_said(
    name: str, config: dict[str, object], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = add(write_checkpoint(tmp_path, "llama"), {name: torch.ones(2)}, **config)
    with caplog.at_level(logging.WARNING):
        read_model_config(open_checkpoint(path))
    (record,) = caplog.records
    assert words in record.getMessage()
    assert f"1 tensors, {name} for one" in record.getMessage()


@pytest.mark.parametrize("family", ["smollm2", "gemma3"])
def test_a_head_of_its_own_is_used(family: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, family)
    config = json.loads((path / "config.json").read_text())
    assert config["tie_word_embeddings"]
    table = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    add(path, {"lm_head.weight": table.clone()})
    assert read_model_config(open_checkpoint(path)).ties_embeddings
    head = table.clone()
    head[-1, -1] += 1
    add(path, {"lm_head.weight": head})
    assert not read_model_config(open_checkpoint(path)).ties_embeddings


def test_a_tied_table_under_the_name_of_the_head(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "smollm2")
    tensors = load_file(path / "model.safetensors")
    expected = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(path)
    assert read_model_config(checkpoint).ties_embeddings
    weight = checkpoint.tensor("model.embed_tokens.weight")
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, expected)


def test_an_engine_refuses_it_whatever_its_cache_holds(tmp_path: Path) -> None:
    from engine.config import EngineConfig

    path = write_checkpoint(tmp_path / "model", "llama")
    config = EngineConfig(model=str(path), kv_cache_memory="1MiB", cache_dir=str(tmp_path / "cache"))
    ModelRunner(config, open_checkpoint(path))
    add(path, {f"{LAYER}.mlp.down_proj.bias": torch.ones(64)})
    with pytest.raises(CheckpointError, match="no place for"):
        ModelRunner(config, open_checkpoint(path))
