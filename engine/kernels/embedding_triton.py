"""The Triton body of `engine.kernels.embedding`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import Tile, launch, select_tile, target_of


def lookup_in_triton(
    token_ids: torch.Tensor,
    table: torch.Tensor,
    scale: torch.Tensor | None,
    group_size: int | None,
    dtype: torch.dtype,
    tile: Tile | None,
) -> torch.Tensor:
    """`lookup` without a factor."""
    target = target_of(table)
    assert target is not None
    num_tokens, features = token_ids.shape[0], table.shape[1]
    tile = tile or select_tile(target, "embedding", num_tokens)
    y = torch.empty(num_tokens, features, dtype=dtype, device=table.device)
    launch(
        _lookup_kernel,
        (num_tokens, triton.cdiv(features, tile["BLOCK"])),
        {"token_ids": token_ids, "table": table, "scale": scale, "output": y, "features": features},
        tile,
        GROUP=group_size or features,
    )
    return y


@triton.jit
def _lookup_kernel(token_ids, table, scale, output, features, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < features
    row = tl.load(token_ids + token).to(tl.int64)
    values = tl.load(table + row * features + columns, is_column, 0).to(tl.float32)
    if scale is not None:
        scales = tl.load(scale + row * tl.cdiv(features, GROUP) + columns // GROUP, is_column, 0.0)
        values *= scales.to(tl.float32)
    tl.store(output + token * features + columns, values.to(output.dtype.element_ty), is_column)
