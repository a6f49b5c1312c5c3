"""The steps that change a model's shape: planned on the calibration's text, noted in the record, seen as a view.

The plan is made once, on the whole model: an interrupted run takes it from the record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from engine.compression.channels import Kept, choose_kept, narrowed, without_channels
from engine.compression.layers import least_influential, measure_influences, without_layers
from engine.compression.recipe import Recipe
from engine.compression.record import Record
from engine.compression.steps import DropChannels, DropLayers
from engine.errors import ConfigError
from engine.loading.checkpoint import Checkpoint
from engine.loading.model_config import read_model_config
from engine.models.config import ModelConfig


def reshaped(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """The shape that the recipe gives a model; which layers have which window is not known yet.

    Raises:
        ConfigError: There is not so much to leave out, or nothing is.
    """
    for step in recipe.structure:
        match step:
            case DropLayers(count):
                if count >= config.num_layers:
                    raise ConfigError(
                        f"steps: {step}: the model has {config.num_layers} layers; leave out fewer"
                    )
                config = replace(config, num_layers=config.num_layers - count)
            case DropChannels(share):
                config = narrowed(config, share)
    return config


def restructure(
    checkpoint: Checkpoint,
    recipe: Recipe,
    token_ids: torch.Tensor,
    record: Record,
    report: Callable[[str], None],
) -> Checkpoint:
    """The checkpoint in its new shape.

    Args:
        token_ids: [windows, length], the calibration's text.
    """
    for step in recipe.structure:
        config = read_model_config(checkpoint)
        match step:
            case DropLayers(count):
                checkpoint = _drop_layers(checkpoint, config, count, token_ids, record, report)
            case DropChannels(share):
                checkpoint = _drop_channels(checkpoint, config, share, token_ids, record, report)
    return checkpoint


def _drop_layers(
    checkpoint: Checkpoint,
    config: ModelConfig,
    count: int,
    token_ids: torch.Tensor,
    record: Record,
    report: Callable[[str], None],
) -> Checkpoint:
    if "layers" not in record.structure:
        influences = measure_influences(checkpoint, config, token_ids)
        dropped = least_influential(influences, count)
        record.structure["layers"] = {"dropped": dropped, "influences": influences}
        record.write()
    dropped = record.structure["layers"]["dropped"]
    report(f"layers={count}: leaves out {', '.join(map(str, dropped))} of {config.num_layers}")
    return without_layers(checkpoint, config, dropped)


def _drop_channels(
    checkpoint: Checkpoint,
    config: ModelConfig,
    share: float,
    token_ids: torch.Tensor,
    record: Record,
    report: Callable[[str], None],
) -> Checkpoint:
    new = narrowed(config, share)
    if "channels" not in record.structure:
        chosen = choose_kept(checkpoint, config, new, token_ids)
        # Channels are many: a number in hexadecimal whose bit i says whether channel i stays.
        record.structure["channels"] = {
            "kv_heads": [layer["attention"] for layer in chosen],
            "mlp": [f"{sum(1 << channel for channel in layer['MLP']):x}" for layer in chosen],
        }
        record.write()
    found = record.structure["channels"]
    report(
        f"channels={share:g}: {config.intermediate_size} channels become {new.intermediate_size}, "
        f"{config.num_kv_heads} KV heads {new.num_kv_heads}"
    )
    kept: Kept = [
        {
            "attention": heads,
            "MLP": [channel for channel in range(config.intermediate_size) if int(bits, 16) >> channel & 1],
        }
        for heads, bits in zip(found["kv_heads"], found["mlp"], strict=True)
    ]
    return without_channels(checkpoint, config, kept)
