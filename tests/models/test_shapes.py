"""Tensors of another shape than the model needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import CheckpointError
from engine.loading.checkpoint import open_checkpoint
from engine.loading.weights import load_weights
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.shapes import tensor_shape
from engine.parallel.group import TensorGroup
from engine.parallel.pipeline import Pipeline
from engine.quant.plan import QuantizationPlan
from engine.quant_spec import parse_quant_spec
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_every_tensor_has_the_shape_that_transformers_gives_it(tmp_path: Path, family: str) -> None:
    write_checkpoint(tmp_path, TINY_CONFIGS[family])
    checkpoint = open_checkpoint(tmp_path)
    config = ModelConfig.from_dict(checkpoint.config)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor_shape(config, name) == tuple(tensor.shape), name


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.2.mlp.down_proj.weight",
    ],
)
def test_another_shape_is_named_before_anything_is_cached(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, TINY_CONFIGS["llama-biases"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    expected = list(tensors[name].shape)
    save_file({**tensors, name: tensors[name][:-2].clone()}, file)
    checkpoint = open_checkpoint(tmp_path)
    quantization = QuantizationPlan(parse_quant_spec("none"), torch.float32)
    model = Decoder(
        ModelConfig.from_dict(checkpoint.config), quantization, torch.float32, TensorGroup(), Pipeline()
    )
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, checkpoint, "none", tmp_path / "cache", torch.device("cpu"), is_packed=False)
    found = [expected[0] - 2, *expected[1:]]
    assert str(caught.value) == f"{tmp_path}: tensor {name!r}: expected shape {expected}, found {found}"
    assert not (tmp_path / "cache").exists()
