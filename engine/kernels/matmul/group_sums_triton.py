"""Sums of consecutive activations, which a product with int4 weights multiplies by their minimums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.launch import Tile, launch, select_tile, target_of
from engine.kernels.operands import SUM_SIZE, GroupSums


def reference(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] float → float32 sums [M, ceil(K / 32)] of 32 consecutive elements along K."""
    padded = F.pad(x.float(), (0, -x.shape[1] % SUM_SIZE))
    return padded.view(x.shape[0], -1, SUM_SIZE).sum(dim=2)


@triton.jit
def sum_groups(values, GROUP: tl.constexpr):
    """[BLOCK] float32 → [BLOCK / GROUP]: neighbours are added pairwise, so that nothing else decides the order."""
    for i in tl.static_range(GROUP):
        if 1 << i < GROUP:
            even, odd = tl.split(tl.reshape(values, (values.shape[0] // 2, 2)))
            values = even + odd
    return values


@triton.jit(do_not_specialize=["num_tokens"])
def _group_sums_kernel(
    x,
    sums,
    num_tokens,
    in_features,
    num_sums,
    SUM_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NUM_SUMS: tl.constexpr = BLOCK_K // SUM_SIZE
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_row = (rows < num_tokens)[:, None]
    rows = rows.to(tl.int64)[:, None]
    values = tl.load(
        x + rows * in_features + columns[None, :], is_row & (columns < in_features)[None, :], 0.0
    )
    # A row is whole groups, so that rows one behind the other are, too.
    totals = sum_groups(tl.reshape(values.to(tl.float32), (BLOCK_M * BLOCK_K,)), SUM_SIZE)
    totals = tl.reshape(totals, (BLOCK_M, NUM_SUMS))
    groups = tl.program_id(1) * NUM_SUMS + tl.arange(0, NUM_SUMS)
    tl.store(sums + rows * num_sums + groups[None, :], totals, is_row & (groups < num_sums)[None, :])


def group_sums(x: torch.Tensor, tile: Tile | None = None) -> GroupSums:
    """x [M, K] float, contiguous, with its sums; on a target of Triton."""
    target = target_of(x)
    assert target is not None
    num_tokens, in_features = x.shape
    tile = tile or select_tile(target, "group_sums", num_tokens)
    sums = torch.empty(num_tokens, triton.cdiv(in_features, SUM_SIZE), dtype=torch.float32, device=x.device)
    launch(
        _group_sums_kernel,
        (triton.cdiv(num_tokens, tile["BLOCK_M"]), triton.cdiv(in_features, tile["BLOCK_K"])),
        {
            "x": x,
            "sums": sums,
            "num_tokens": num_tokens,
            "in_features": in_features,
            "num_sums": sums.shape[1],
        },
        tile,
        SUM_SIZE=SUM_SIZE,
    )
    return GroupSums(x, sums)
