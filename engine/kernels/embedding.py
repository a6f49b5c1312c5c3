"""Rows of an embedding table by token id; the table is float, or int8 with scales of rows or of groups along K.

Tables of other forms have their rows looked up by what multiplies with them: `engine.quant.scheme.TableMatmul`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.kernels.launch import Tile, target_of


def reference(
    token_ids: torch.Tensor,
    table: torch.Tensor,
    scale: torch.Tensor | None,
    group_size: int | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`lookup` without a factor, in torch's operators."""
    if scale is None:
        return F.embedding(token_ids, table).to(dtype)
    codes, columns = table.index_select(0, token_ids).float(), table.shape[1]
    scale = scale.index_select(0, token_ids).float().view(len(token_ids), -1)
    return (codes * scale.repeat_interleave(group_size or columns, dim=1)[:, :columns]).to(dtype)


def lookup(
    token_ids: torch.Tensor,
    table: torch.Tensor,
    scale: torch.Tensor | None,
    group_size: int | None,
    dtype: torch.dtype,
    factor: float = 1.0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Rows of the table, in float32 until they are rounded to `dtype`, times a factor.

    Args:
        token_ids: [T] int64 or int32, each below V.
        table: [V, K] float, or int8 codes.
        scale: Of the codes, [V] float or, with groups, [V, ceil(K / group_size)].
        group_size: Elements of a row that share a scale; None: all.

    Returns:
        [T, K] of `dtype`.
    """
    if target_of(table) is None:
        return multiplied(reference(token_ids, table, scale, group_size, dtype), factor)
    from engine.kernels.embedding_triton import lookup_in_triton

    return multiplied(lookup_in_triton(token_ids, table, scale, group_size, dtype, tile), factor)


def multiplied(rows: torch.Tensor, factor: float) -> torch.Tensor:
    """Rows times a factor, in their own type."""
    return rows if factor == 1.0 else rows * factor
