"""Weights in groups, and random ones of GGUF's types."""

from __future__ import annotations

import torch

from engine.kernels.matmul.grouped_weight import GroupedWeight, GroupNumbers
from engine.quant.block_weight import BLOCK_TYPES, BlockWeight


def random_block_weight(kind: str, rows: int, columns: int, is_simple: bool = False) -> BlockWeight:
    """A weight [rows, columns] with every code that the type has; some groups are empty.

    Args:
        is_simple: Scales and minimums are multiples of 1/4 of few bits, so that small sums are exact.
    """
    block_type = BLOCK_TYPES[kind]
    parts = block_type.parts(rows, columns, "cpu")
    limit = 256 if block_type.bits == 4 else 1 << block_type.bits
    for name, part in parts.items():
        if name == "codes":
            part.random_(0, limit)
        elif name.endswith("_steps"):
            low = 0 if name == "minimum_steps" else -32
            part.random_(low, 4 if is_simple else 64)
            part[::5, 0] = 0
        elif is_simple:
            part.copy_(torch.randint(-3, 4, part.shape) / 4)
        else:
            # Where numbers are steps of these, they are so much smaller.
            exponent = torch.randint(-6, 3, (rows, 1)) - (6 if block_type.block_size else 0)
            part.normal_().mul_(2.0**exponent)
    return BlockWeight(kind, parts, columns)


def grouped(codes: torch.Tensor, scale: torch.Tensor | None, group_size: int) -> GroupedWeight:
    """int8 codes [N, K], and scales [N, groups] if they have any."""
    return GroupedWeight(
        codes=codes,
        in_features=codes.shape[1],
        group_size=group_size,
        scale=None if scale is None else GroupNumbers(scale),
    )
