"""The Triton body of `engine.kernels.matmul.weight_only`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import Tile, launch, select_tile, target_of
from engine.kernels.matmul.segments_triton import (
    SEGMENT,
    finish_tile,
    load_groups,
    partial_pointers,
    plan_split,
)
from engine.kernels.matmul.weight_only import GroupSize


@triton.jit(do_not_specialize=["num_tokens", "segments_per_program"])
def _weight_only_kernel(
    x,
    weight,
    scale,
    bias,
    output,
    partials,
    counters,
    num_tokens,
    segments_per_program,
    in_features,
    out_features,
    num_groups,
    GROUP_SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_K if GROUP_SIZE is None else GROUP_SIZE
    tl.static_assert(BLOCK_K % WIDTH == 0)
    PARTS: tl.constexpr = BLOCK_K // WIDTH
    STEPS: tl.constexpr = SEGMENT // BLOCK_K
    # bf16 products are wrong in the interpreter.
    dtype: tl.constexpr = tl.float32 if INTERPRETED else x.dtype.element_ty

    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = (tokens < num_tokens)[:, None]
    # Rows past the end read the last one's weights; their products are not stored.
    rows = tl.minimum(features, out_features - 1)
    columns = tl.arange(0, WIDTH)
    x_rows = x + tokens.to(tl.int64)[:, None] * in_features + columns[None, :]
    weight_rows = weight + rows.to(tl.int64)[:, None] * in_features + columns[None, :]
    first = tl.program_id(1) * segments_per_program
    end = tl.minimum((first + segments_per_program) * STEPS, tl.cdiv(in_features, BLOCK_K))

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    segment_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if GROUP_SIZE is not None:
        scales = load_groups(scale, first * STEPS, rows, num_groups, 1, num_groups, PARTS)
    for step in range(first * STEPS, end):
        if GROUP_SIZE is not None:
            next_scales = load_groups(scale, step + 1, rows, num_groups, 1, num_groups, PARTS)
        for part in tl.static_range(PARTS):
            start = step * BLOCK_K + part * WIDTH
            if HAS_TAIL:
                is_column = (start + columns < in_features)[None, :]
                values = tl.load(x_rows + start, is_token & is_column, 0.0)
                weights = tl.load(weight_rows + start, is_column, 0)
            else:
                values = tl.load(x_rows + start, is_token, 0.0)
                weights = tl.load(weight_rows + start)
            values = tl.trans(values.to(dtype))
            weights = weights.to(dtype)
            if GROUP_SIZE is None:
                segment_total = tl.dot(weights, values, segment_total, input_precision="ieee")
            else:
                product = tl.dot(weights, values, input_precision="ieee")
                group_scale = tl.broadcast_to(scales[part][:, None], (BLOCK_N, BLOCK_M))
                segment_total = tl.fma(product, group_scale, segment_total)
        if GROUP_SIZE is not None:
            scales = next_scales
        if (step + 1) % STEPS == 0 or step + 1 == end:
            if partials is not None:
                tl.store(partial_pointers(partials, step // STEPS, BLOCK_N, BLOCK_M), segment_total)
            else:
                total += segment_total
            segment_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    row_scale = scale if GROUP_SIZE is None else None
    num_segments = tl.cdiv(in_features, SEGMENT)
    finish_tile(
        output,
        total,
        row_scale,
        bias,
        partials,
        counters,
        num_tokens,
        out_features,
        num_segments,
        BLOCK_N,
        BLOCK_M,
    )


def weight_only_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    group_size: GroupSize,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    tile: Tile | None = None,
    segments_per_program: int | None = None,
) -> torch.Tensor:
    """`WeightOnlyMatmul` on a target of Triton; its bits depend on neither of the last two arguments.

    Args:
        counters: From `new_counters`.
        segments_per_program: Instead of as many as fill the chip.
    """
    target = target_of(x)
    assert target is not None
    (num_tokens, in_features), out_features = x.shape, weight.shape[0]
    operation = "weight_only_matmul" if weight.dtype == torch.int8 else "weight_only_matmul.float"
    tile = tile or select_tile(target, operation, num_tokens)
    split = plan_split(target, tile, x, out_features, segments_per_program)
    output = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    launch(
        _weight_only_kernel,
        (
            triton.cdiv(out_features, tile["BLOCK_N"]),
            split.programs,
            triton.cdiv(num_tokens, tile["BLOCK_M"]),
        ),
        {
            "x": x,
            "weight": weight,
            "scale": scale,
            "bias": bias,
            "output": output,
            "partials": split.partials,
            "counters": None if split.partials is None else counters,
            "num_tokens": num_tokens,
            "segments_per_program": split.segments,
            "in_features": in_features,
            "out_features": out_features,
            "num_groups": 1 if group_size is None else triton.cdiv(in_features, group_size),
        },
        tile,
        GROUP_SIZE=group_size,
        SEGMENT=SEGMENT,
        HAS_TAIL=in_features % tile["BLOCK_K"] != 0,
        INTERPRETED=target.arch == "interpreter",
    )
    return output
