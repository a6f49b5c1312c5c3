"""Leaving out whole layers: those that turn the hidden states least.

    influence = 1 - mean cos(x, y)        x [T, hidden] before the layer, y behind it, over the calibration's tokens

Source: Men et al. 2024, "ShortGPT", section 3 (arXiv:2403.03853). The influences are those in the whole model: all
layers that go are chosen by one pass.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from tqdm import tqdm

from engine.compression.calibration import Calibration
from engine.compression.view import CheckpointView
from engine.loading.checkpoint import Checkpoint
from engine.models.config import ModelConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def block_influence(before: torch.Tensor, after: torch.Tensor) -> float:
    """One less the mean cosine between hidden states [T, hidden] before a layer and behind it."""
    return 1 - float(torch.nn.functional.cosine_similarity(before, after, dim=1).double().mean())


def measure_influences(checkpoint: Checkpoint, config: ModelConfig, token_ids: torch.Tensor) -> list[float]:
    """The block influence of each layer on windows [windows, length] of a text; one layer is in memory at a time."""
    calibration = Calibration(checkpoint, config, token_ids)
    layers = calibration.layers(known=set(range(config.num_layers)))
    before, influences = calibration.hidden, []
    next(layers)
    for _ in tqdm(range(config.num_layers), desc="Measuring layers", unit="layer"):
        # The text goes through a layer when the next one is asked for.
        next(layers, None)
        influences.append(block_influence(before, calibration.hidden))
        before = calibration.hidden
    return influences


def least_influential(influences: Sequence[float], count: int) -> list[int]:
    """The indices of so many layers, ascending; of equal ones the first."""
    order = sorted(range(len(influences)), key=influences.__getitem__)
    return sorted(order[:count])


def without_layers(checkpoint: Checkpoint, config: ModelConfig, dropped: Sequence[int]) -> CheckpointView:
    """The checkpoint with the other layers alone, numbered anew.

    Args:
        config: The whole model's.
    """
    kept = [layer for layer in range(config.num_layers) if layer not in set(dropped)]
    places = {layer: place for place, layer in enumerate(kept)}
    names = {}
    for name in checkpoint.names():
        match = _LAYER.match(name)
        if match is None:
            names[name] = name
        elif int(match[1]) in places:
            names[f"model.layers.{places[int(match[1])]}.{name[match.end() :]}"] = name
    changes: dict[str, object] = {"num_hidden_layers": len(kept)}
    windows = config.sliding_windows
    if checkpoint.config.get("layer_types") or len(set(windows)) > 1:
        # A rule by the layer's number would say something else of the new numbers.
        changes["layer_types"] = [
            "full_attention" if windows[layer] is None else "sliding_attention" for layer in kept
        ]
    return CheckpointView(checkpoint, changes, names, lambda name: checkpoint.tensor(names[name]))
