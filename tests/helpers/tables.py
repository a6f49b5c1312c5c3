"""Embedding tables of every scheme that one may have."""

from __future__ import annotations

import torch

from engine.quant.block_weight import BLOCK_TYPES
from engine.quant.blocks import Blocks
from engine.quant.floating import Float
from engine.quant.int8_groups import Int8Groups
from engine.quant.int8_weight_only import Int8WeightOnly
from engine.quant.scheme import Scheme, TableMatmul
from engine.quant.weight import to_float
from tests.helpers.block_weights import random_block_weight

TABLES: list[Scheme] = [
    Float(torch.float32),
    *(Int8Groups(size) for size in (32, 64, 128, 256)),
    Int8Groups(64, "groups"),
    Int8WeightOnly(64),
    *map(Blocks, BLOCK_TYPES),
]


def takes(scheme: Scheme, columns: int) -> bool:
    """Whether a table may have so many columns: types of four bits have pairs of them."""
    return not isinstance(scheme, Blocks) or columns % 2 == 0


def bound_table(scheme: Scheme, rows: int, columns: int) -> tuple[TableMatmul, torch.Tensor]:
    """A random table's product, and what its weight stands for by the scheme's documentation, float32."""
    if isinstance(scheme, Blocks):
        weight = random_block_weight(scheme.name, rows, columns)
        tensors, values = scheme.quantize(weight), to_float(weight)
    else:
        tensors = scheme.quantize(torch.randn(rows, columns))
        values = tensors["weight"].float()
        if "scale" in tensors:
            scale = tensors["scale"].float().view(rows, -1)
            size = getattr(scheme, "group_size", None) or columns
            values = values * scale.repeat_interleave(size, dim=1)[:, :columns]
    matmul = scheme.bind(tensors, None)
    assert isinstance(matmul, TableMatmul)
    return matmul, values
