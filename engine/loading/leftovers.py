"""What a checkpoint holds that its model has no place for: refused, unless leaving it out changes nothing.

A bias that config.json does not name, or a layer too many, belongs to another model than the one that would be built:
its answers would be wrong without a word.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.loading.checkpoint import Checkpoint
from engine.models.config import ModelConfig
from engine.models.shapes import tensor_names

logger = logging.getLogger(__name__)

_NAMED_AT_MOST = 3

# Tables and masks that old releases of transformers saved; every release computes them.
_COMPUTED = re.compile(r"\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$")

_CACHE_SCALE = re.compile(r"\.[qkv]v?_(scale|zero_point)$")

# Parts that a text model can do without, by a word of the first parts of a name.
_PARTS = {
    "multi-token prediction": re.compile(r"(^|\.)mtp"),
    "other modalities": re.compile(r"vision|visual|image|video|audio|speech|multi_?modal|mm_|aligner"),
}
_PREDICTION_LAYERS = "num_nextn_predict_layers"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def check_leftovers(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compares the checkpoint's tensors with those that the model reads, and says what is left out.

    Raises:
        CheckpointError: Leaving one out would change what the model computes.
    """
    left = (checkpoint.names() | checkpoint.other_names()) - tensor_names(config)
    notes: dict[str, list[str]] = {}
    refused = []
    for name in sorted(left):
        part = _optional_part(name, checkpoint.config)
        if part is not None:
            notes.setdefault(part, []).append(name)
        elif not (_COMPUTED.search(name) or _is_tied_head(name, config) or _is_zero_bias(name, checkpoint)):
            refused.append(name)
    if refused:
        named = ", ".join(map(repr, refused[:_NAMED_AT_MOST]))
        more = f" and {len(refused) - _NAMED_AT_MOST} more" if len(refused) > _NAMED_AT_MOST else ""
        raise CheckpointError(
            f"{checkpoint.path}: a model of type {config.family!r} with this config.json has no place for "
            f"{named}{more}: without them it would compute something else; correct config.json, or take them out"
        )
    for part, names in notes.items():
        logger.warning(
            "%s: left out, %s: %d tensors, %s for one", checkpoint.path, part, len(names), names[0]
        )


def _optional_part(name: str, config: dict[str, Any]) -> str | None:
    """What a tensor belongs to, if a text model can do without it."""
    if _CACHE_SCALE.search(name):
        return "scales of a quantized KV cache (the engine's own needs none)"
    start = ".".join(name.split(".")[:3])
    for part, words in _PARTS.items():
        if words.search(start):
            return part
    layer = _LAYER.match(name)
    predicted = config.get(_PREDICTION_LAYERS)
    if (
        layer is not None
        and type(predicted) is int
        and 0 <= int(layer[1]) - config["num_hidden_layers"] < predicted
    ):
        return "multi-token prediction"
    return None


def _is_tied_head(name: str, config: ModelConfig) -> bool:
    # A head that differs from the table is not tied: see `engine.loading.model_config`.
    return name == "lm_head.weight" and config.ties_embeddings


def _is_zero_bias(name: str, checkpoint: Checkpoint) -> bool:
    """Whether it is a bias that adds nothing: some exporters of GPTQ write one for each matrix."""
    if not name.endswith(".bias") or name not in checkpoint.names():
        return False
    bias = checkpoint.tensor(name)
    return isinstance(bias, torch.Tensor) and not bool(torch.any(bias))
