"""Makes compressed checkpoints, layer by layer: what `python -m engine.quant` runs.

Weights are memory-mapped and one layer's floats are in memory at a time. Each layer is calibrated on what the
quantized layers before it give, read back from the file as it was written: a run that was interrupted goes on to the
same bytes.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from engine.compression.calibration import CalibratedLayer, Calibration, CalibrationText
from engine.compression.dense import write_dense
from engine.compression.layer_quantizer import quantize_layer, quantize_weight
from engine.compression.ranks import plan_ranks
from engine.compression.recipe import Recipe
from engine.compression.record import Record, mean_error
from engine.compression.rotated import rotated
from engine.compression.structure import reshaped, restructure
from engine.compression.writing import (
    compressed_tensors,
    compressed_tensors_config,
    is_expressible,
    of_float16,
    write_directory,
    write_shard,
)
from engine.errors import ConfigError
from engine.loading.checkpoint import Checkpoint, open_checkpoint
from engine.loading.formats import QUANTIZATION_KEYS, WeightFormat, weight_format
from engine.loading.formats.own import own_config, own_parts
from engine.loading.formats.stored import StoredModule
from engine.loading.model_config import read_model_config
from engine.loading.weights import checkpoint_key
from engine.models.config import ModelConfig
from engine.models.modules import ROLES, first_of_product, module_names
from engine.models.shapes import tensor_names, tensor_shape
from engine.quant.block_weight import BlockWeight
from engine.quant.lowrank import INNER
from engine.quant.weight import GridWeight, Weight, to_float
from engine.quant_spec import EMBEDDING, ENDS, LM_HEAD, TABLE_GROUP_SIZE, SchemeSpec

_REST = "model-rest.safetensors"


@dataclass(frozen=True, slots=True)
class Layout:
    """How the modules are written.

    Attributes:
        quantization: `quantization_config` of config.json; None where all are floats.
        is_published: compressed-tensors, else our own.
    """

    recipe: Recipe
    quantization: dict[str, Any] | None
    is_published: bool

    @staticmethod
    def choose(recipe: Recipe, config: ModelConfig) -> Layout:
        """The published one where it can express every module."""
        schemes = {module: recipe.quant_spec.of(module) for module in module_names(config)}
        if all(words.kind == "none" for words in schemes.values()):
            return Layout(recipe, None, is_published=True)
        is_published = schemes[EMBEDDING].kind == "none" and all(
            is_expressible(words, tensor_shape(config, f"{module}.weight")[1], recipe.has_float_minimums)
            for module, words in schemes.items()
        )
        quantization = (
            compressed_tensors_config(schemes, recipe.is_symmetric)
            if is_published
            else own_config(recipe.quant_spec)
        )
        return Layout(recipe, quantization, is_published)

    def __str__(self) -> str:
        if self.quantization is None:
            return "floats"
        if self.is_published:
            return "compressed-tensors (vLLM and transformers load it)"
        return "this engine's own layout"

    def tensors(self, module: str, weight: Weight) -> dict[str, torch.Tensor]:
        """What is stored of a module, by tensor name."""
        if isinstance(weight, torch.Tensor):
            parts = {"weight": weight}
        elif self.is_published:
            assert isinstance(weight, GridWeight)
            words = self.recipe.quant_spec.of(module)
            parts = compressed_tensors(weight, words, self.recipe.is_symmetric)
        else:
            assert not isinstance(weight, BlockWeight)
            try:
                parts = own_parts(weight, self.recipe.quant_spec.of(module))
            except ConfigError as error:
                raise ConfigError(f"{module}: {error}") from error
            if module != first_of_product(module):
                # The first one has the inner factor for all.
                parts = {part: tensor for part, tensor in parts.items() if not part.startswith(INNER)}
        return {f"{module}.{part}": tensor for part, tensor in parts.items()}

    def format(self, directory: Path) -> WeightFormat | None:
        """The format that reads what is written, by the settings that it has in config.json."""
        return weight_format(directory, {"quantization_config": self.quantization})


def quantize_checkpoint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    text: CalibrationText,
    directory: Path,
    report: Callable[[str], None],
    dense: Path | None = None,
) -> None:
    """Writes a compressed checkpoint into a directory; goes on with what an interrupted run left there.

    Args:
        dense: Where the same numbers are written as floats, too.

    Raises:
        ConfigError: A directory holds something else, the checkpoint is quantized already, or the recipe is not for
            such a model.
    """
    if dense is not None:
        _check_dense(dense, directory, recipe)
    if any(checkpoint.config.get(key) for key in QUANTIZATION_KEYS):
        raise ConfigError(f"{checkpoint.path}: is quantized already; start from the float checkpoint")
    config = read_model_config(checkpoint)
    recipe.check_model(reshaped(config, recipe))
    origin = {
        "source": str(checkpoint.path),
        "source_key": checkpoint_key(checkpoint),
        "recipe": recipe.description,
        "calibration": {"windows": list(text.token_ids.shape), "digest": text.digest},
    }
    record = Record.open(directory, origin, "out")
    if dense is not None:
        Record.open(dense, origin, "dense")
    checkpoint = restructure(checkpoint, recipe, text.token_ids, record, report)
    config = read_model_config(checkpoint)
    if recipe.rotates:
        checkpoint = rotated(checkpoint, config)
        config = read_model_config(checkpoint)
    recipe = plan_ranks(checkpoint, config, recipe, text.token_ids, record, report)
    layout = Layout.choose(recipe, config)
    known = {layer for layer in range(config.num_layers) if (directory / _shard(layer)).exists()}
    if known:
        report(f"going on after {len(known)} layers that are there")
    shards: dict[str, list[str]] = {}
    calibration = Calibration(checkpoint, config, text.token_ids)
    unseen = known if recipe.needs_inputs else set(range(config.num_layers))
    progress = tqdm(calibration.layers(unseen), total=config.num_layers, desc="Quantizing", unit="layer")
    for layer in progress:
        path = directory / _shard(layer.index)
        if layer.index not in known:
            write_shard(_quantize_layer(layer, layout, checkpoint, config, record), path)
            record.write()
        shards[path.name] = _load_shard(layer, path, layout.format(directory))
        progress.set_postfix_str(_describe(record, layer.index))
    rest = _quantize_rest(checkpoint, config, calibration, layout, record)
    write_shard(rest, directory / _REST)
    shards[_REST] = list(rest)
    record.write()
    has_head = any(name.startswith(f"{LM_HEAD}.") for name in rest)
    new_config = checkpoint.config | {"tie_word_embeddings": not has_head}
    if layout.quantization is None:
        new_config = of_float16(new_config)
    else:
        new_config["quantization_config"] = layout.quantization
    write_directory(directory, checkpoint, new_config, shards)
    if dense is not None:
        write_dense(open_checkpoint(directory), dense)
        report(f"{dense}: the same numbers, rounded to float16")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report(f"{directory}: {layout}; signal to noise at outputs: {_describe(record)}; peak {peak:.0f} MiB")
    pruned = [module for module in module_names(config) if module not in ENDS]
    dense_ones = [module for module in pruned if not recipe.quant_spec.of(module).is_sparse]
    if recipe.pruning is not None and dense_ones:
        report(
            f"{recipe.pruning}: the zeros of {len(dense_ones)} of {len(pruned)} matrices are stored and multiplied "
            "as any weight is, which makes them neither smaller nor faster; two of four (2of4) are both under "
            "sparse24:int8 and sparse24:int4"
        )


def _check_dense(dense: Path, directory: Path, recipe: Recipe) -> None:
    if not recipe.quant_spec.is_quantized:
        raise ConfigError(f"dense: {directory} will be a checkpoint of floats; leave --dense out")
    if dense.resolve() == directory.resolve():
        raise ConfigError("dense: is the same directory as --out; give another")


def _shard(layer: int) -> str:
    return f"model-layer-{layer:05d}.safetensors"


def _describe(record: Record, layer: int | None = None) -> str:
    """The mean errors of a layer, or of all, in dB."""
    parts = {"": record.errors, " of zeros": record.pruning_errors}
    found = [f"{mean_error(errors, layer):.1f} dB{name}" for name, errors in parts.items() if errors]
    return ", ".join(found) or "nothing rounded"


def _quantize_layer(
    layer: CalibratedLayer, layout: Layout, checkpoint: Checkpoint, config: ModelConfig, record: Record
) -> dict[str, torch.Tensor]:
    """All tensors of a layer, quantized modules' parts and the rest as floats; the errors go into the record."""
    quantized = quantize_layer(layer, layout.recipe)
    tensors: dict[str, torch.Tensor] = {}
    for module, weight in quantized.weights.items():
        tensors |= layout.tensors(module, weight)
    for name in sorted(tensor_names(config)):
        if (
            name.startswith(f"model.layers.{layer.index}.")
            and name.removesuffix(".weight") not in quantized.weights
        ):
            new = quantized.floats.get(name)
            tensors[name] = to_float(checkpoint.tensor(name)) if new is None else new
    record.errors |= quantized.errors
    record.pruning_errors |= quantized.pruning_errors
    return tensors


def _quantize_rest(
    checkpoint: Checkpoint, config: ModelConfig, calibration: Calibration, layout: Layout, record: Record
) -> dict[str, torch.Tensor]:
    """All tensors that are in no layer; the errors of head and embedding, if quantized, go into the record.

    A head that is tied to the embedding becomes one of its own if it is to be quantized by itself.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(tensor_names(config)):
        is_end = name in (f"{LM_HEAD}.weight", f"{EMBEDDING}.weight")
        if not (is_end or name.startswith("model.layers.")):
            tensors[name] = to_float(checkpoint.tensor(name)).to(torch.float16)
    for module in (EMBEDDING, LM_HEAD):
        words = layout.recipe.quant_spec.of(module)
        is_tied = module == LM_HEAD and config.ties_embeddings
        if words.kind == "none":
            if not is_tied:
                tensors[f"{module}.weight"] = to_float(checkpoint.tensor(f"{module}.weight")).half()
            continue
        if module == LM_HEAD:
            moment = calibration.head_statistics().second_moment
        else:
            # A table is not multiplied: all of its columns matter alike.
            moment = torch.eye(config.hidden_size, dtype=torch.float64)
            words = SchemeSpec("int8", TABLE_GROUP_SIZE)
        weight = to_float(checkpoint.tensor(f"{EMBEDDING if is_tied else module}.weight")).float()
        new, record.errors[module] = quantize_weight(weight, moment, words, layout.recipe)
        tensors |= layout.tensors(module, new)
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


def _load_shard(layer: CalibratedLayer, path: Path, format: WeightFormat | None) -> list[str]:
    """Puts what is written in the place of the layer's floats; the names in the file."""
    with safe_open(path, framework="pt") as file:
        source = _ShardSource(path, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    for role in ROLES:
        for name, weight in layer.weights(role.name).items():
            module = StoredModule(source, name)
            is_quantized = format is not None and any(module.has(part) for part in format.parts)
            weight.copy_(to_float(format.read(module) if format and is_quantized else module.read("weight")))
        for name, bias in layer.biases(role.name).items():
            bias.copy_(source.read(f"{name}.bias"))
    for norm in layer.norms.values():
        norm.weight = source.read(f"{norm.source}.weight").float() + norm.offset
    return list(source.tensors)
