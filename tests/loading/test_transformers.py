"""Checkpoints that our command wrote, loaded by transformers through compressed-tensors."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaForCausalLM, PreTrainedModel

from engine.compression.calibration import CalibrationText
from engine.compression.quantize import quantize_checkpoint
from engine.compression.recipe import Recipe
from engine.loading.checkpoint import open_checkpoint
from engine.quant.weight import GridWeight, Weight, to_float
from tests.helpers.log_probabilities import assert_same_log_probabilities
from tests.helpers.tiny import TINY_CONFIGS, write_checkpoint

Weights = dict[str, Weight]

TOKENS = torch.arange(40).view(2, 20) * 7 % 320


@pytest.fixture(scope="module")
def float_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformers") / "float"
    config = deepcopy(TINY_CONFIGS["llama"])
    config.intermediate_size = 128  # whole groups, which compressed-tensors needs
    write_checkpoint(path, config)
    return path


def write_quantized(float_path: Path, path: Path, scheme: str, is_symmetric: bool) -> tuple[Path, Weights]:
    """What the command writes, and the weights that our reader finds there."""
    recipe = Recipe.parse(scheme, is_symmetric=is_symmetric)
    text = CalibrationText(torch.arange(96).view(2, 48), "numbers")
    quantize_checkpoint(open_checkpoint(float_path), recipe, text, path / "out", lambda line: None)
    written = open_checkpoint(path / "out")
    assert written.config["quantization_config"]["quant_method"] == "compressed-tensors"
    weights = {name: written.tensor(name) for name in written.names()}
    assert sum(isinstance(weight, GridWeight) for weight in weights.values()) >= 7
    return path / "out", weights


def float_logits(path: Path, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of a model of float weights."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.load_state_dict(weights)
    return logits_of(model)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    logits: torch.Tensor = model(TOKENS).logits
    return logits


@pytest.mark.parametrize(
    ("scheme", "is_symmetric"),
    [
        ("int4:g32", True),
        ("int8:weight-only", False),
        ("int8:g32:weight-only", False),
        ("int4:g32,*.down_proj=int8:weight-only,model.layers.0.self_attn.*=none", True),
    ],
)
def test_logits_are_those_of_our_weights(
    float_path: Path, tmp_path: Path, scheme: str, is_symmetric: bool
) -> None:
    """Both dequantize to float32, and exactly: codes of eight bits times scales of eleven, or one rounded product."""
    path, weights = write_quantized(float_path, tmp_path, scheme, is_symmetric)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = float_logits(float_path, {name: to_float(weight).float() for name, weight in weights.items()})
    assert torch.equal(logits_of(loaded), expected)
    assert_same_log_probabilities(path, loaded)


@pytest.mark.parametrize(
    ("scheme", "is_symmetric"), [("int4:g32", False), ("int4:g0", False), ("int8", False)]
)
def test_weights_are_ours(float_path: Path, tmp_path: Path, scheme: str, is_symmetric: bool) -> None:
    """Dequantized as they are loaded, which is to the type of the scales.

    Zero-points load in no other way: compressed-tensors 0.20 makes them of the wrong shape for a model that stays
    quantized. And activations stay floats.
    """
    path, weights = write_quantized(float_path, tmp_path, scheme, is_symmetric)
    loaded = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    rounded = {
        name: to_float(weight)
        .to(weight.scale.dtype if isinstance(weight, GridWeight) else torch.float32)
        .float()
        for name, weight in weights.items()
    }
    for name, weight in rounded.items():
        assert torch.equal(loaded.get_parameter(name), weight), name
    assert torch.equal(logits_of(loaded), float_logits(float_path, rounded))


def test_layouts_may_be_mixed(float_path: Path, tmp_path: Path) -> None:
    scheme = "int4:g32,*.down_proj=int8,model.layers.0.*=none"
    path, weights = write_quantized(float_path, tmp_path, scheme, is_symmetric=True)
    logits = logits_of(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    expected = float_logits(float_path, {name: to_float(weight).float() for name, weight in weights.items()})
    # transformers rounds the activations of int8 layers to int8, one scale a token: 1 % of them, in two products.
    assert (logits - expected).norm() < 0.03 * expected.norm()
