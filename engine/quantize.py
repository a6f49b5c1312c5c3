"""Makes quantized checkpoints, layer by layer: what `python -m engine.quant` runs.

Weights are memory-mapped and one layer's floats are in memory at a time. Each layer is calibrated on what the
quantized layers before it give, and is written as soon as it is done.
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from tqdm import tqdm

from engine.calibration import CalibratedLayer, Calibration, CalibrationText
from engine.errors import ConfigError
from engine.loading.checkpoint import Checkpoint
from engine.loading.formats import QUANTIZATION_KEYS, weight_format
from engine.loading.formats.stored import StoredModule
from engine.loading.model import checkpoint_key
from engine.loading.writing import (
    compressed_tensors,
    compressed_tensors_config,
    is_expressible,
    own_config,
    own_layout,
    write_directory,
    write_shard,
)
from engine.models.config import ModelConfig
from engine.quant.awq import round_clipped, search_scale
from engine.quant.clipping import mse_ranges
from engine.quant.gptq import FindGrid, InputStatistics, gptq, output_errors
from engine.quant.rounding import Ranges, fit_grid, full_ranges, round_to_nearest
from engine.quant.weight import GridWeight, to_float

Algorithm = Literal["rtn", "mse", "gptq", "awq"]
SHRINKAGE = 2.0
"""What is added to the diagonal of GPTQ's second moment, of itself: as though inputs were that much less correlated.

Correlations are learnt from one kind of text, and weights that make up for each other's errors under them do worse
than plain rounding where they do not hold. SmolLM2 in groups of 128, calibrated on Python's help topics, has on
Wikipedia's text (6,200 tokens, 14.05 as floats) a perplexity of 18.75 rounded to nearest; by GPTQ 18.66 without
shrinkage, 17.11 with 0.5 and 16.95 with 2.0 (the first with half as much text).
"""

ROLES = ("qkv", "output", "gate_up", "down")
RECORD = "quantization.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights are quantized.

    Attributes:
        bits: 4, or 8 with a scale a row.
        group_size: Of four bits; 0 is whole rows.
        symmetric: Codes around zero; four bits may have a zero-point instead.
    """

    bits: Literal[4, 8] = 4
    group_size: int = 32
    symmetric: bool = False
    algorithm: Algorithm = "rtn"

    def __post_init__(self) -> None:
        if self.group_size not in (0, 32, 64, 128):
            raise ConfigError(f"group: must be 32, 64, 128 or 0 for whole rows, got {self.group_size}")
        if self.bits == 8 and not (self.symmetric and self.group_size == 0):
            raise ConfigError("scheme: int8 has a symmetric scale a row; leave --group and --asymmetric out")
        if self.bits == 8 and self.algorithm not in ("rtn", "mse"):
            raise ConfigError(f"algorithm: {self.algorithm} is for int4; int8 takes rtn or mse")


@dataclass(frozen=True, slots=True)
class Quantized:
    """A layer's new tensors.

    Attributes:
        weights: By module name.
        floats: Norms that a scale was folded into, by tensor name.
        errors: By module name: the output's signal to quantization noise, in dB.
    """

    weights: dict[str, GridWeight]
    floats: dict[str, torch.Tensor]
    errors: dict[str, float]


def find_grid(recipe: Recipe) -> FindGrid:
    """The grid of a group's values [N, g]: their range, widened to hold zero, so that its zero-point is a code."""

    def find(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ranges = Ranges(values.amin(dim=1).clamp(max=0), values.amax(dim=1).clamp(min=0))
        grid = fit_grid(ranges, 4, recipe.symmetric)
        assert grid.minimum is not None
        return grid.scale, grid.minimum

    return find


def round_directly(weight: torch.Tensor, recipe: Recipe) -> GridWeight:
    """Round-to-nearest of [N, K], within each group's range or the one of least squared error."""
    group_size = recipe.group_size or None
    scale_dtype = torch.float16 if recipe.bits == 4 else torch.float32
    if recipe.algorithm == "mse":
        ranges = mse_ranges(weight, group_size, recipe.bits, recipe.symmetric)
    else:
        ranges = full_ranges(weight, group_size)
    ranges = Ranges(ranges.low.clamp(max=0), ranges.high.clamp(min=0))
    return round_to_nearest(weight, recipe.bits, group_size, recipe.symmetric, ranges, scale_dtype)


def quantize_layer(layer: CalibratedLayer, recipe: Recipe) -> Quantized:
    """Quantizes a layer's weights and puts the values of the new ones in the old ones' place."""
    floats = _fold_scales(layer, recipe) if recipe.algorithm == "awq" else {}
    weights: dict[str, GridWeight] = {}
    errors: dict[str, float] = {}
    for role in ROLES:
        moment = layer.statistics[role].second_moment
        for module, weight in layer.weights(role).items():
            new = _quantize(weight, moment, recipe)
            values = new.dequantize()
            errors[module] = _signal_to_noise(weight, values, moment)
            weight.copy_(values)
            weights[module] = new
    return Quantized(weights, floats, errors)


def _quantize(weight: torch.Tensor, moment: torch.Tensor, recipe: Recipe) -> GridWeight:
    group_size = recipe.group_size or weight.shape[1]
    match recipe.algorithm:
        case "gptq":
            shrunk = moment + SHRINKAGE * torch.diag(moment.diagonal())
            return gptq(weight, shrunk, find_grid(recipe), group_size, 16, by_activation=True)
        case "awq":
            return round_clipped(weight, moment, find_grid(recipe), group_size, 16)
    return round_directly(weight, recipe)


def _fold_scales(layer: CalibratedLayer, recipe: Recipe) -> dict[str, torch.Tensor]:
    """AWQ's scales, taken out of what feeds each weight: the norms, and up_proj for down_proj.

    Attention's output projection is only clipped: its inputs are shared by the heads of a group.
    """
    rows = Recipe(recipe.bits, recipe.group_size, recipe.symmetric)
    floats = {}
    for role in ("down", "qkv", "gate_up"):
        weights, statistics = list(layer.weights(role).values()), layer.statistics[role]
        found = search_scale(
            weights,
            statistics.mean_magnitude,
            statistics.second_moment,
            lambda weight: round_directly(weight, rows),
        )
        scale = found.scale.float()
        for weight in weights:
            weight.mul_(scale)
        layer.statistics[role] = _divided(statistics, found.scale)
        if role == "down":
            up = list(layer.weights("gate_up").values())[1]
            up.div_(scale[:, None])
        else:
            norm = layer.norms[role]
            norm.weight = norm.weight / scale
            floats[f"{norm.source}.weight"] = norm.weight - norm.offset
    return floats


def _divided(statistics: InputStatistics, scale: torch.Tensor) -> InputStatistics:
    """The statistics of inputs divided by a scale [K]."""
    products = statistics.products / torch.outer(scale, scale)
    return InputStatistics(
        products, statistics.magnitudes / scale, statistics.peaks / scale, statistics.num_tokens
    )


def _signal_to_noise(weight: torch.Tensor, values: torch.Tensor, moment: torch.Tensor) -> float:
    """10 log10 of the output's mean square by that of its error, in dB."""
    signal = float(output_errors(weight, moment).sum())
    noise = float(output_errors(values - weight, moment).sum())
    return math.inf if noise <= 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def quantize_checkpoint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    text: CalibrationText,
    directory: Path,
    report: Callable[[str], None],
) -> None:
    """Writes a quantized checkpoint into a directory; goes on with what an interrupted run left there.

    Raises:
        ConfigError: The directory holds something else, or the checkpoint is quantized already.
    """
    if any(checkpoint.config.get(key) for key in QUANTIZATION_KEYS):
        raise ConfigError(f"{checkpoint.path}: is quantized already; start from the float checkpoint")
    config = _model_config(checkpoint)
    sizes = {config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size}
    is_published = recipe.bits == 8 or all(is_expressible(size, recipe.group_size) for size in sizes)
    quantization = (
        compressed_tensors_config(recipe.bits, recipe.group_size, recipe.symmetric)
        if is_published
        else own_config(recipe.group_size)
    )
    record: dict[str, object] = {
        "source": str(checkpoint.path),
        "source_key": checkpoint_key(checkpoint),
        "recipe": asdict(recipe),
        "calibration": {"windows": list(text.token_ids.shape), "digest": text.digest},
    }
    errors: dict[str, float] = _open_directory(directory, record)
    known = {layer for layer in range(config.num_layers) if (directory / _shard(layer)).exists()}
    if known:
        report(f"going on after {len(known)} layers that are there")
    shards: dict[str, list[str]] = {}
    calibration = Calibration(checkpoint, config, text.token_ids)
    progress = tqdm(calibration.layers(known), total=config.num_layers, desc="Quantizing", unit="layer")
    for layer in progress:
        path = directory / _shard(layer.index)
        if layer.index in known:
            _reload(layer, path, directory, quantization)
        else:
            quantized = quantize_layer(layer, recipe)
            errors |= quantized.errors
            write_shard(_tensors(layer, quantized, is_published, recipe, checkpoint), path)
            _write_record(directory, record, errors)
        progress.set_postfix_str(f"{_mean_error(errors, layer.index):.1f} dB")
        with safe_open(path, framework="pt") as file:
            shards[path.name] = list(file.keys())
    rest = {
        name: to_float(checkpoint.tensor(name)).to(torch.float16)
        for name in sorted(checkpoint.names())
        if not name.startswith("model.layers.") and not (name == "lm_head.weight" and config.ties_embeddings)
    }
    write_shard(rest, directory / "model-rest.safetensors")
    shards["model-rest.safetensors"] = list(rest)
    write_directory(directory, checkpoint, quantization, shards)
    layout = (
        "compressed-tensors (vLLM and transformers load it)" if is_published else "this engine's own layout"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report(
        f"{directory}: {layout}; output signal to noise {_mean_error(errors):.1f} dB on average; peak {peak:.0f} MiB"
    )


def _model_config(checkpoint: Checkpoint) -> ModelConfig:
    ties = checkpoint.config.get("tie_word_embeddings") or "lm_head.weight" not in checkpoint.names()
    return ModelConfig.from_dict({**checkpoint.config, "tie_word_embeddings": ties})


def _shard(layer: int) -> str:
    return f"model-layer-{layer:05d}.safetensors"


def _tensors(
    layer: CalibratedLayer, quantized: Quantized, is_published: bool, recipe: Recipe, checkpoint: Checkpoint
) -> dict[str, torch.Tensor]:
    """All tensors of a layer: quantized modules' parts, and the rest as floats."""
    tensors: dict[str, torch.Tensor] = {}
    for module, weight in quantized.weights.items():
        parts = compressed_tensors(weight, recipe.symmetric) if is_published else own_layout(weight)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    for name in checkpoint.names():
        if (
            name.startswith(f"model.layers.{layer.index}.")
            and name.removesuffix(".weight") not in quantized.weights
        ):
            new = quantized.floats.get(name)
            tensors[name] = to_float(checkpoint.tensor(name)) if new is None else new
    return tensors


@dataclass(frozen=True, slots=True)
class _ShardSource:
    """One file's tensors; see `engine.loading.formats.stored.TensorSource`."""

    path: Path
    tensors: dict[str, torch.Tensor]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def locate(self, name: str) -> tuple[Path, str]:
        return self.path, name


def _reload(layer: CalibratedLayer, path: Path, directory: Path, quantization: dict[str, object]) -> None:
    """Puts what an earlier run wrote in the place of the layer's floats."""
    with safe_open(path, framework="pt") as file:
        source = _ShardSource(path, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    layout = weight_format(directory, {"quantization_config": quantization})
    assert layout is not None
    for role in ROLES:
        for module, weight in layer.weights(role).items():
            weight.copy_(to_float(layout.read(StoredModule(source, module))))
    for norm in layer.norms.values():
        norm.weight = source.read(f"{norm.source}.weight").float() + norm.offset


def _open_directory(directory: Path, record: dict[str, object]) -> dict[str, float]:
    """Makes the directory, or checks that it holds the beginning of the same; the errors noted there."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / RECORD
    if not file.exists():
        if any(directory.iterdir()):
            raise ConfigError(f"out: {directory} is not empty, and not of an interrupted run; give another")
        _write_record(directory, record, {})
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    errors: dict[str, float] = found.pop("signal_to_noise_db")
    if found != json.loads(json.dumps(record)):
        raise ConfigError(f"out: {directory} is of another model, recipe or calibration; give another")
    return errors


def _write_record(directory: Path, record: dict[str, object], errors: dict[str, float]) -> None:
    text = json.dumps(record | {"signal_to_noise_db": errors}, indent=2)
    (directory / RECORD).write_text(text + "\n", encoding="utf-8")


def _mean_error(errors: dict[str, float], layer: int | None = None) -> float:
    """The mean over a layer's modules, or over all."""
    prefix = "" if layer is None else f"model.layers.{layer}."
    values = [error for module, error in errors.items() if module.startswith(prefix)]
    return sum(values) / len(values)
