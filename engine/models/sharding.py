"""A model's configuration as one of several ranks sees it, and whether ranks can share it at all."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import ConfigError
from engine.kernels.rotation import ROTATION_BLOCK
from engine.models.config import ModelConfig
from engine.models.modules import ROLES
from engine.parallel.shards import Shard
from engine.quant.plan import SCHEMES
from engine.quant_spec import QuantSpec


def shard_of_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The model as one rank sees it between its column-parallel and its row-parallel layers."""
    heads, kv_heads = shard.of_heads(config.num_heads), shard.of_heads(config.num_kv_heads)
    inner = shard.of(config.intermediate_size)
    return replace(
        config,
        num_heads=heads.stop - heads.start,
        num_kv_heads=kv_heads.stop - kv_heads.start,
        intermediate_size=inner.stop - inner.start,
    )


def check_shards(config: ModelConfig, size: int) -> None:
    """
    Raises:
        ConfigError: The model cannot be cut into so many shares; names what does not divide and what would work.
    """
    obstacles = _obstacles(config, size)
    if obstacles:
        working = [str(n) for n in range(1, config.num_heads + 1) if not _obstacles(config, n)]
        raise ConfigError(
            f"tensor_parallel_size: {size} ranks cannot share {' and '.join(obstacles)}; "
            f"sizes that work for this model: {', '.join(working)}"
        )


def check_columns(config: ModelConfig, quant_spec: QuantSpec, size: int) -> None:
    """Whether ranks can share the columns of the weights that they would have to without `--exact-reduce`.

    Raises:
        ConfigError: They would cut groups that share a scale or are rotated together; names them and what would work.
    """
    found = _cut_groups(config, quant_spec, size)
    if found:
        sizes = range(1, config.num_heads + 1)
        working = [str(n) for n in sizes if not (_obstacles(config, n) or _cut_groups(config, quant_spec, n))]
        raise ConfigError(
            f"exact_reduce: without it, {size} ranks cut {' and '.join(found)}; leave "
            f"--no-exact-reduce out, or take a --tensor-parallel-size of {' or '.join(working)}"
        )


def _cut_groups(config: ModelConfig, quant_spec: QuantSpec, size: int) -> list[str]:
    if size == 1:
        return []
    widths = {
        projection.name: role.in_features(config)
        for role in ROLES
        if role.split == "rows"
        for projection in role.projections
    }
    found: dict[str, None] = {}
    for layer in range(config.num_layers):
        for name, width in widths.items():
            words = quant_spec.of(f"model.layers.{layer}.{name}")
            group = SCHEMES[words.kind].scale_group or words.group_size
            bond = "share a scale"
            if words.is_rotated and group <= ROTATION_BLOCK:
                group, bond = ROTATION_BLOCK, "are rotated together"
            if group and width % (size * group):
                found[f"the {width} input features of {name} within groups of {group}, which {bond}"] = None
    return list(found)


def _obstacles(config: ModelConfig, size: int) -> list[str]:
    found = [
        f"{number} {name}"
        for name, number in (
            ("attention heads", config.num_heads),
            ("hidden features", config.hidden_size),
            ("MLP features", config.intermediate_size),
        )
        if number % size
    ]
    if config.num_kv_heads % size and size % config.num_kv_heads:
        found.append(f"{config.num_kv_heads} KV heads")
    return found
