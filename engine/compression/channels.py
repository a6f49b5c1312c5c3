"""Leaving out channels of the MLPs, and KV heads with the queries that read them: those that add least.

    importance of block b of the inputs of W = mean ‖W_b x_b‖² = Σ_n W[n, b] H_bb W[n, b]ᵀ        H = mean x xᵀ

W is the projection whose outputs are added to the hidden states, x what it gets on the calibration's tokens: a block
is a channel of the MLP, or all query heads of a KV head. That is the output's error without the block alone. In each
layer as many are left out, so that the narrower model is one of the same family; what is left is not changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from engine.compression.calibration import Calibration
from engine.compression.view import CheckpointView
from engine.errors import ConfigError
from engine.loading.checkpoint import Checkpoint
from engine.models.config import ModelConfig
from engine.models.modules import ROLES, Block
from engine.quant.weight import Weight, to_float

WIDTH_STEP = 64
"""MLPs keep multiples of so many channels, which kernels and groups of scales divide."""

_BLOCKS: dict[Block, Callable[[ModelConfig], int]] = {
    "attention": lambda config: config.num_kv_heads,
    "MLP": lambda config: config.intermediate_size,
}
"""How many a layer has of what can be left out of each part of it."""

Kept = list[dict[Block, list[int]]]
"""For each layer, which KV heads and channels stay, ascending."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """What becomes of a projection where its block's parts are left out.

    Attributes:
        size: Rows or columns of one part.
        axis: 0: rows, and the bias; 1: columns.
    """

    block: Block
    size: int
    axis: int


def narrowed(config: ModelConfig, share: float) -> ModelConfig:
    """The model without this share of channels and KV heads, at most.

    Raises:
        ConfigError: So small a share changes nothing.
    """
    channels, heads = config.intermediate_size, config.num_kv_heads
    # Shares like 0.2 are a little off as floats.
    width = min(channels, math.ceil(round(channels * (1 - share) / WIDTH_STEP, 6)) * WIDTH_STEP)
    num_kv_heads = max(1, heads - math.floor(round(heads * share, 6)))
    if (width, num_kv_heads) == (channels, heads):
        raise ConfigError(
            f"steps: channels={share:g}: leaves out nothing of {channels} channels, of which a multiple of "
            f"{WIDTH_STEP} stays, and {heads} KV heads; give a larger share"
        )
    return replace(
        config,
        intermediate_size=width,
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * (config.num_heads // heads),
    )


def block_importance(weight: torch.Tensor, moment: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The mean square of what each block of inputs adds to the outputs, [num_blocks] float64.

    Args:
        weight: [N, K].
        moment: [K, K] float64, the second moment of its inputs.
    """
    size = weight.shape[1] // num_blocks
    parts = weight.double().view(len(weight), num_blocks, size)
    blocks = moment.view(num_blocks, size, num_blocks, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return (torch.einsum("nbs,bst->nbt", parts, blocks) * parts).sum(dim=(0, 2))


def choose_kept(
    checkpoint: Checkpoint, config: ModelConfig, new: ModelConfig, token_ids: torch.Tensor
) -> Kept:
    """Which KV heads and channels stay of each layer, by windows [windows, length] of a text.

    Args:
        new: The narrower model.
    """
    kept: Kept = []
    layers = Calibration(checkpoint, config, token_ids).layers(known=set())
    for layer in tqdm(layers, total=config.num_layers, desc="Measuring channels", unit="layer"):
        found: dict[Block, list[int]] = {}
        for role in ROLES:
            if role.split == "rows":
                count = _BLOCKS[role.block]
                (weight,) = layer.weights(role.name).values()
                moment = layer.statistics[role.name].second_moment
                order = block_importance(weight, moment, count(config)).argsort(descending=True, stable=True)
                found[role.block] = sorted(order[: count(new)].tolist())
        kept.append(found)
    return kept


def without_channels(checkpoint: Checkpoint, config: ModelConfig, kept: Kept) -> CheckpointView:
    """The checkpoint with these channels and KV heads alone; what is cut is float.

    Args:
        config: The whole model's.
    """
    cuts = {
        projection.name: _Cut(role.block, size // _BLOCKS[role.block](config), axis)
        for role in ROLES
        for projection in role.projections
        for axis, size in [
            (1, role.in_features(config)) if role.split == "rows" else (0, projection.out_features(config))
        ]
    }

    def read(name: str) -> Weight:
        weight = checkpoint.tensor(name)
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        found = None if match is None else cuts.get(match[2])
        if match is None or found is None or (match[3] == "bias" and found.axis == 1):
            return weight
        first = torch.tensor(kept[int(match[1])][found.block]) * found.size
        index = (first[:, None] + torch.arange(found.size)).flatten()
        return to_float(weight).index_select(found.axis, index)

    num_kv_heads = len(kept[0]["attention"])
    changes = {
        "intermediate_size": len(kept[0]["MLP"]),
        "num_key_value_heads": num_kv_heads,
        "num_attention_heads": num_kv_heads * (config.num_heads // config.num_kv_heads),
        # It follows from the number of heads no more.
        "head_dim": config.head_dim,
    }
    return CheckpointView(checkpoint, changes, checkpoint.names(), read)
