"""Which products of a model become two factors, and of which rank: found by one pass over the whole model.

The plan is noted in the record: an interrupted run takes it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from engine.compression.calibration import CalibratedLayer, Calibration
from engine.compression.lowrank import Choice, energies, least_rank, spend
from engine.compression.recipe import Recipe
from engine.compression.record import Record
from engine.compression.steps import LowRank
from engine.errors import ConfigError
from engine.loading.checkpoint import Checkpoint
from engine.models.config import ModelConfig
from engine.models.modules import ROLES, module_names
from engine.quant.plan import SCHEMES, QuantizationPlan
from engine.quant_spec import QuantSpec, SchemeSpec


@dataclass(frozen=True, slots=True)
class Product:
    """Projections that are multiplied as one matrix, and share an inner factor.

    Attributes:
        name: Of the layer and the role, "model.layers.0.qkv".
        modules: Names in the checkpoint.
        choices: From the smallest rank on; the last one is that the matrices stay as they are.
    """

    name: str
    modules: tuple[str, ...]
    choices: tuple[Choice, ...]


def plan_ranks(
    checkpoint: Checkpoint,
    config: ModelConfig,
    recipe: Recipe,
    token_ids: torch.Tensor,
    record: Record,
    report: Callable[[str], None],
) -> Recipe:
    """The recipe with the rank of each module that becomes two factors; the others get the factors' scheme.

    Args:
        token_ids: [windows, length], the calibration's text.

    Raises:
        ConfigError: The budget is below that of the smallest ranks.
    """
    step = recipe.low_rank
    if step is None:
        return recipe
    if "lowrank" not in record.structure:
        products = _measure(checkpoint, config, recipe, step, token_ids)
        chosen = _choose(products, step)
        before = sum(product.choices[-1].num_bytes for product in products)
        record.structure["lowrank"] = {
            "ranks": {
                product.name: choice.rank
                for product, choice in zip(products, chosen, strict=True)
                if choice.rank
            },
            "kept": [
                product.name for product, choice in zip(products, chosen, strict=True) if not choice.rank
            ],
            "bytes": sum(choice.num_bytes for choice in chosen),
            "bytes_before": before,
        }
        record.write()
    found = record.structure["lowrank"]
    ranks = found["ranks"]
    report(
        f"{step}: {len(ranks)} of {len(ranks) + len(found['kept'])} products become two factors, of ranks "
        f"{min(ranks.values(), default=0)} to {max(ranks.values(), default=0)}; all have "
        f"{found['bytes'] / found['bytes_before']:.3f} of the bytes"
    )
    schemes = {module: recipe.quant_spec.of(module) for module in module_names(config)}
    for layer in range(config.num_layers):
        for role in ROLES:
            for module in role.modules(f"model.layers.{layer}"):
                if schemes[module].is_low_rank:
                    rank = ranks.get(f"model.layers.{layer}.{role.name}", 0)
                    words = schemes[module]
                    schemes[module] = replace(words, rank=rank) if rank else words.dense
    return replace(recipe, quant_spec=QuantSpec.covering(schemes, schemes))


def _choose(products: list[Product], step: LowRank) -> list[Choice]:
    if step.by == "energy":
        return [least_rank(product.choices, step.amount) for product in products]
    before = sum(product.choices[-1].num_bytes for product in products)
    least = sum(product.choices[0].num_bytes for product in products)
    if least > step.amount * before:
        raise ConfigError(
            f"steps: {step}: the smallest ranks take {least / before:.3f} of the bytes already; give more"
        )
    return spend([product.choices for product in products], step.amount * before)


def _measure(
    checkpoint: Checkpoint, config: ModelConfig, recipe: Recipe, step: LowRank, token_ids: torch.Tensor
) -> list[Product]:
    products = []
    layers: Iterable[CalibratedLayer]
    if step.is_whitened:
        layers = Calibration(checkpoint, config, token_ids).layers(known=set())
    else:
        layers = (CalibratedLayer(index, config, checkpoint) for index in range(config.num_layers))
    for layer in tqdm(layers, total=config.num_layers, desc="Measuring ranks", unit="layer"):
        for role in ROLES:
            weights = layer.weights(role.name)
            words = recipe.quant_spec.of(next(iter(weights)))
            if words.is_low_rank:
                weight = torch.cat(list(weights.values()))
                moment = layer.statistics[role.name].second_moment if step.is_whitened else None
                choices = _choices(energies(weight, moment), weight.shape, words)
                products.append(Product(f"model.layers.{layer.index}.{role.name}", tuple(weights), choices))
    return products


def _choices(found: torch.Tensor, shape: torch.Size, words: SchemeSpec) -> tuple[Choice, ...]:
    """The ranks of a matrix [N, K] that take fewer bytes than it does, and that it stays."""
    out_features, in_features = shape
    kept = (found.cumsum(0) / found.sum().clamp(min=torch.finfo(found.dtype).tiny)).tolist()
    whole = num_bytes(words.dense, out_features, in_features)
    choices = []
    for rank in range(rank_step(shape), min(shape), rank_step(shape)):
        taken = num_bytes(replace(words, rank=rank), out_features, in_features)
        if taken >= whole:
            break
        choices.append(Choice(rank, taken, kept[rank - 1]))
    return (*choices, Choice(0, whole, 1.0))


def rank_step(shape: torch.Size) -> int:
    """Ranks are multiples of this: 64, which products read rows in, or what an eighth of a small matrix has."""
    return min(64, 1 << max(0, (min(shape) // 8).bit_length() - 1))


def num_bytes(words: SchemeSpec, out_features: int, in_features: int) -> int:
    """Bytes of a weight [out_features, in_features] that is stored so; floats are float16."""
    scheme = SCHEMES[words.kind].make(words, QuantizationPlan(QuantSpec(words), torch.float16))
    return sum(tensor.nbytes for tensor in scheme.storage(out_features, in_features).values())
