"""The Triton body of `engine.kernels.matmul.int8`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import Target, Tile, launch, select_tile, target_of
from engine.kernels.matmul.int8 import MAX_IN_FEATURES
from engine.kernels.matmul.sparse24 import SparseCodes, split_sparse
from engine.kernels.matmul.sparse24_triton import load_sparse
from engine.kernels.operands import Int8Activations
from engine.kernels.quantize import LOW_STEPS

PROGRAMS_A_PROCESSOR = 2
"""A product of few tokens is split along K until each processor has this many programs to load at a time …"""

MIN_SPLIT_FEATURES = 1024
"""… but not into smaller parts, whose sums would cost as much traffic as their weights."""

_LOW_STEPS: tl.constexpr = tl.constexpr(LOW_STEPS)


def int8_matmul_in_triton(
    x: Int8Activations,
    weight: torch.Tensor | SparseCodes,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int | None,
    arrivals: torch.Tensor | None,
    tile: Tile | None,
) -> torch.Tensor:
    """`int8_matmul` in one launch."""
    target = target_of(scale)
    assert target is not None
    (num_tokens, in_features), out_features = x.high.shape, weight.shape[0]
    num_terms = 1 if x.low is None else 2
    assert in_features <= MAX_IN_FEATURES
    assert x.high.stride() == (num_terms * in_features, 1)
    assert x.low is None or x.low.storage_offset() == x.high.storage_offset() + in_features
    assert scale.dim() == 1 or (group_size and scale.shape[1] == x.scale.shape[1])
    codes, masks = split_sparse(weight)
    assert masks is None or not group_size
    operation = (
        "int8_matmul_grouped" if group_size else ("int8_matmul", "int8_matmul_two_terms")[num_terms - 1]
    )
    if masks is not None:
        operation = "sparse24_int8_matmul"
    tile = tile or select_tile(target, operation, num_tokens)
    block_k = group_size or tile["BLOCK_K"]
    num_tiles = triton.cdiv(out_features, tile["BLOCK_N"])
    num_parts, partial_sums = 1, None
    # Only where one tile serves all tokens: the split follows from N, K and the tile, not from the batch.
    if (
        arrivals is not None
        and not group_size
        and num_terms * (tile.max_tokens or num_tokens) <= tile["BLOCK_M"]
    ):
        num_parts = split_of(target, num_tiles, in_features)
    if num_parts > 1:
        shape = (num_parts, out_features, tile["BLOCK_M"])
        partial_sums = torch.empty(shape, dtype=torch.int32, device=scale.device)
    y = torch.empty(num_tokens, out_features, dtype=x.dtype, device=scale.device)
    launch(
        _int8_matmul_kernel,
        (triton.cdiv(num_terms * num_tokens, tile["BLOCK_M"]) * num_tiles, num_parts),
        {
            "x": x.high,
            "token_scale": x.scale,
            "weight": codes,
            "masks": masks,
            "weight_scale": scale,
            "bias": bias,
            "output": y,
            "partial_sums": partial_sums,
            "arrivals": arrivals if num_parts > 1 else None,
            "num_tokens": num_tokens,
            "out_features": out_features,
            "in_features": in_features,
        },
        tile,
        **({"BLOCK_K": group_size} if group_size else {}),
        TERMS=num_terms,
        IS_GROUPED=group_size is not None,
        IS_WEIGHT_GROUPED=scale.dim() == 2,
        IS_EVEN=in_features % block_k == 0,
    )
    return y


def split_of(target: Target, num_tiles: int, in_features: int) -> int:
    """Parts of K for each tile of the output."""
    wanted = triton.cdiv(PROGRAMS_A_PROCESSOR * target.num_processors, num_tiles)
    return max(1, min(wanted, in_features // MIN_SPLIT_FEATURES))


@triton.jit(do_not_specialize=["num_tokens"])
def _int8_matmul_kernel(
    x,
    token_scale,
    weight,
    masks,
    weight_scale,
    bias,
    output,
    partial_sums,
    arrivals,
    num_tokens,
    out_features,
    in_features,
    TERMS: tl.constexpr,
    IS_GROUPED: tl.constexpr,
    IS_WEIGHT_GROUPED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_M: tl.constexpr,
):
    """Rows are those of the terms: with two, row 2m is the high term of token m and row 2m + 1 its low one.

    The weight is the left operand: its 64 rows a matrix instruction are there however few the tokens.
    Programs take TILES_M tiles of rows before they move on along N, so that both operands stay in the L2 cache.
    """
    num_rows = num_tokens * TERMS
    num_tiles_m, num_tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    band = tl.program_id(0) // (TILES_M * num_tiles_n)
    height = tl.minimum(num_tiles_m - band * TILES_M, TILES_M)
    place = tl.program_id(0) % (TILES_M * num_tiles_n)
    tile_m, tile_n = band * TILES_M + place % height, place // height

    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    within = tl.arange(0, BLOCK_K)
    is_row = rows < num_rows
    # Features beyond the last repeat it; they are not stored.
    weight_rows = tl.minimum(features, out_features - 1).to(tl.int64)
    x += rows.to(tl.int64)[:, None] * in_features + within[None, :]
    if masks is None:
        weight += weight_rows[:, None] * in_features + within[None, :]

    num_blocks = tl.cdiv(in_features, BLOCK_K)
    blocks_a_part = tl.cdiv(num_blocks, tl.num_programs(1))
    first = tl.program_id(1) * blocks_a_part
    last = tl.minimum(first + blocks_a_part, num_blocks)

    if IS_GROUPED:
        tokens = tile_m * (BLOCK_M // TERMS) + tl.arange(0, BLOCK_M // TERMS)
        is_token = tokens < num_tokens
        total = tl.zeros((BLOCK_N, BLOCK_M // TERMS), tl.float32)
        for block in range(num_blocks):
            # Loaded before the product, they arrive during it.
            scales = tl.load(token_scale + (tokens * num_blocks + block), is_token, 0.0)
            if IS_WEIGHT_GROUPED:
                weight_scales = tl.load(weight_scale + (weight_rows * num_blocks + block))
            sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
            sums = _add_block(
                sums, x, weight, masks, weight_rows, block, in_features, is_row, IS_EVEN, BLOCK_K
            )
            if TERMS == 2:
                high, low = tl.split(tl.reshape(sums, (BLOCK_N, BLOCK_M // 2, 2)))
                sums = high * _LOW_STEPS + low
                scales *= 1 / _LOW_STEPS
            share = sums.to(tl.float32) * scales[None, :]
            if IS_WEIGHT_GROUPED:
                share *= weight_scales[:, None]
            total += share
        if not IS_WEIGHT_GROUPED:
            total *= tl.load(weight_scale + weight_rows)[:, None]
        _write(total, bias, output, tile_m, features, num_tokens, out_features, BLOCK_M // TERMS)
    else:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for block in range(first, last):
            sums = _add_block(
                sums, x, weight, masks, weight_rows, block, in_features, is_row, IS_EVEN, BLOCK_K
            )
        if partial_sums is None:
            _scale_and_write(
                sums,
                token_scale,
                weight_scale,
                bias,
                output,
                tile_m,
                features,
                num_tokens,
                out_features,
                TERMS,
            )
        else:
            mine = partial_sums + features.to(tl.int64)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
            size = out_features.to(tl.int64) * BLOCK_M
            is_stored = (features < out_features)[:, None] & is_row[None, :]
            tl.store(mine + tl.program_id(1) * size, sums, is_stored)
            # Every thread's part is stored before one of them announces it.
            tl.debug_barrier()
            if tl.atomic_add(arrivals + tile_n, 1, sem="acq_rel") == tl.num_programs(1) - 1:
                tl.store(arrivals + tile_n, 0)
                sums = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
                for part in range(tl.num_programs(1)):
                    sums += tl.load(mine + part * size, is_stored, 0, cache_modifier=".cg")
                _scale_and_write(
                    sums, token_scale, weight_scale, bias, output, tile_m, features, num_tokens, out_features,
                    TERMS,
                )  # fmt: skip


@triton.jit
def _add_block(
    sums,
    x,
    weight,
    masks,
    weight_rows,
    block,
    in_features,
    is_row,
    IS_EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sums [BLOCK_N, BLOCK_M] int32 + one block's weight [BLOCK_N, BLOCK_K] × x [BLOCK_M, BLOCK_K]."""
    first = block * BLOCK_K
    if IS_EVEN:
        codes = tl.load(x + first, is_row[:, None], 0)
    else:
        is_column = (first + tl.arange(0, BLOCK_K) < in_features)[None, :]
        codes = tl.load(x + first, is_row[:, None] & is_column, 0)
    if masks is not None:
        weights = load_sparse(weight, masks, weight_rows, first + tl.arange(0, BLOCK_K), in_features, 8)
    elif IS_EVEN:
        weights = tl.load(weight + first)
    else:
        weights = tl.load(weight + first, is_column, 0)
    return tl.dot(weights, tl.trans(codes), sums, out_dtype=tl.int32)


@triton.jit
def _scale_and_write(
    sums, token_scale, weight_scale, bias, output, tile_m, features, num_tokens, out_features,
    TERMS: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = sums.shape[0]
    BLOCK_TOKENS: tl.constexpr = sums.shape[1] // TERMS
    tokens = tile_m * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    scales = tl.load(token_scale + tokens, tokens < num_tokens, 0.0)
    if TERMS == 2:
        high, low = tl.split(tl.reshape(sums, (BLOCK_N, BLOCK_TOKENS, 2)))
        values = high.to(tl.float32) * _LOW_STEPS + low.to(tl.float32)
        scales *= 1 / _LOW_STEPS
    else:
        values = sums.to(tl.float32)
    values *= scales[None, :]
    values *= tl.load(weight_scale + tl.minimum(features, out_features - 1))[:, None]
    _write(values, bias, output, tile_m, features, num_tokens, out_features, BLOCK_TOKENS)


@triton.jit
def _write(values, bias, output, tile_m, features, num_tokens, out_features, BLOCK_TOKENS: tl.constexpr):
    """values [BLOCK_N, BLOCK_TOKENS] float32 + bias → output [M, N]."""
    if bias is not None:
        values += tl.load(bias + tl.minimum(features, out_features - 1))[:, None]
    tokens = tile_m * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    pointers = output + tokens.to(tl.int64)[None, :] * out_features + features[:, None]
    is_stored = (features < out_features)[:, None] & (tokens < num_tokens)[None, :]
    tl.store(pointers, values.to(output.dtype.element_ty), is_stored)
