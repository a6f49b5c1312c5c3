"""Quantized models against transformers running the weights that their grids stand for."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from engine.kernels.operands import SparseInt8Format
from engine.kernels.quantize import HIGH_STEPS
from engine.kernels.rotation import rotate
from engine.quant import cpu_formats
from engine.quant.plan import QuantizationPlan
from engine.quant.scheme import Storage
from engine.quant_spec import parse_quant_spec
from tests.helpers.paged import make_runner, make_sequences, run_chunks
from tests.helpers.tiny import TINY_CONFIGS, load_reference, reference_logits, write_checkpoint

INT8_ERROR = 0.5 / (127 * HIGH_STEPS)
"""Largest rounding error of an activation, relative to the largest of its token."""

NUM_PRODUCTS = 3 * 4 + 1
"""Matrix products in a row through which errors add up: four a layer, and the vocabulary projection."""

AMPLIFICATION = 6
"""A token's largest activation is several times its usual one, and uneven attention magnifies errors."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ragged: no number of input features is a multiple of 32. Aligned: all of them are."""
    ragged = TINY_CONFIGS["smollm2"]
    aligned = deepcopy(ragged)
    aligned.update(
        {
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        }
    )
    root = tmp_path_factory.mktemp("quantized")
    write_checkpoint(root / "ragged", ragged)
    write_checkpoint(root / "aligned", aligned)
    return {name: root / name for name in ("ragged", "aligned")}


def grid_values(scheme: Storage, weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """What a scheme's codes stand for, by the formulas of its documentation."""
    tensors = scheme.quantize(weight)
    columns = weight.shape[1]

    def spread(groups: torch.Tensor) -> torch.Tensor:
        return groups.float().repeat_interleave(group_size, dim=1)[:, :columns]

    if scheme.name == "int8":
        return tensors["weight"].float() * tensors["scale"][:, None]
    scale = spread(tensors["scale"])
    if scheme.name == "int8-g32":
        return tensors["weight"].float() * scale
    codes = tensors["codes"]
    nibbles = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)[:, :columns]
    values = nibbles.float() * scale + spread(tensors["minimum"])
    return rotate(values) if scheme.name.endswith("-rotated") else values


def dequantized(path: Path, quant: str) -> PreTrainedModel:
    """The checkpoint with each weight at its place on the grid; head and table have grids of their own."""
    model = load_reference(path)
    plan = QuantizationPlan(parse_quant_spec(quant), torch.float32)
    (linear,) = plan.schemes(["model.layers.0.mlp.down_proj"])
    group_size = plan.quant_spec.default.group_size
    embedding = model.get_input_embeddings().weight.detach()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(grid_values(plan.head, embedding, 32))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(grid_values(linear, parameter, group_size))
        model.get_input_embeddings().weight.copy_(grid_values(plan.table, embedding, 32))
    return model


@pytest.mark.parametrize(
    ("shape", "quant"),
    [
        ("ragged", "int8"),
        ("aligned", "int8"),
        ("ragged", "int4"),
        ("ragged", "int4:g128"),
        ("aligned", "int4"),
        ("ragged", "int4:rotated"),
    ],
)
def test_logits_are_those_of_the_dequantized_weights(
    checkpoints: dict[str, Path], shape: str, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints[shape]
    # With activations as fine as the format goes; they would hide the weights' own rounding.
    monkeypatch.setattr(cpu_formats, "CPU_ACTIVATIONS", SparseInt8Format(spread=0.0))
    runner = make_runner(path, quant=quant, kv_cache_dtype="float32")
    sequences = make_sequences(runner.model_config.vocab_size)
    reference, original = dequantized(path, quant), load_reference(path)
    tolerance = AMPLIFICATION * NUM_PRODUCTS**0.5 * INT8_ERROR
    for sequence, computed in zip(sequences, run_chunks(runner, sequences), strict=True):
        positions = list(computed)
        logits = torch.stack(list(computed.values()))
        expected = reference_logits(reference, sequence)[positions]
        unrounded = reference_logits(original, sequence)[positions]
        assert relative_error(logits, expected) < tolerance
        assert relative_error(unrounded, expected) > 4 * tolerance, "the weights' own rounding must show"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
