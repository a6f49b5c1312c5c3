"""Rows of an embedding table by token id; the table is float, or int8 in groups of 32 along K."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.kernels import cpu
from engine.kernels.launch import Tile, target_of

GROUP_SIZE = 32
"""Elements of a table's row that share a scale, as in GGUF's Q8_0."""


def reference(
    token_ids: torch.Tensor, table: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`lookup` in torch's operators."""
    if scale is None:
        return F.embedding(token_ids, table).to(dtype)
    codes, scale = table.index_select(0, token_ids), scale.index_select(0, token_ids)
    scale = scale.float().repeat_interleave(GROUP_SIZE, dim=1)[:, : table.shape[1]]
    return (codes.float() * scale).to(dtype)


def lookup(
    token_ids: torch.Tensor,
    table: torch.Tensor,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
    factor: float = 1.0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Rows of the table, in float32 until they are rounded to `dtype`, times a factor.

    Args:
        token_ids: [T] int64 or int32, each below V.
        table: [V, K] float, or int8 codes.
        scale: [V, ceil(K / 32)] float16 of the codes.

    Returns:
        [T, K] of `dtype`.
    """
    target = target_of(table)
    num_tokens, features = token_ids.shape[0], table.shape[1]
    if target is None and token_ids.dtype == torch.int32 and dtype == torch.float32 and cpu.library():
        y = cpu.empty("embedding", num_tokens, features)
        cpu.run(
            "embedding",
            num_tokens,
            token_ids=token_ids,
            table=table,
            scale=scale,
            size=features,
            factor=factor,
            output=y,
        )
        return y
    if target is None:
        y = reference(token_ids, table, scale, dtype)
    else:
        from engine.kernels.embedding_triton import lookup_in_triton

        y = lookup_in_triton(token_ids, table, scale, dtype, tile)
    return y if factor == 1.0 else y * factor
