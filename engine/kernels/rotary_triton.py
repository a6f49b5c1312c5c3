"""The Triton body of `engine.kernels.rotary`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.attention.kv_layer import FP8_MAX, INT4_GROUP, INT4_LARGEST, KVLayer
from engine.kernels.hadamard import hadamard_factors, hadamard_levels
from engine.kernels.hadamard_triton import spread_halves
from engine.kernels.launch import launch, select_tile, target_of

_FP8_MAX = tl.constexpr(FP8_MAX)

_INT4_GROUP = tl.constexpr(INT4_GROUP)

_INT4_LARGEST = tl.constexpr(float(INT4_LARGEST))

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

_ROUNDER = tl.constexpr(1.5 * 2**23)
"""Added to a float32 up to 2**22 and subtracted again, it leaves the nearest integer, of two the even one."""


@triton.jit
def _int4_codes(x, minimum, scale):
    """The nearest codes 0 … 15, in pairs: [H, BLOCK_HALF / 2] uint8."""
    steps = tl.div_rn(x - minimum, tl.where(scale > 0, scale, 1.0))
    steps = tl.minimum(tl.maximum(steps, 0.0), _INT4_LARGEST)
    codes = (steps + _ROUNDER - _ROUNDER).to(tl.uint8)
    even, odd = tl.split(tl.reshape(codes, (codes.shape[0], codes.shape[1] // 2, 2)))
    return even | (odd << 4)


@triton.jit
def _write_int4(
    low,
    high,
    keys,
    values,
    key_scales,
    value_scales,
    key_row,
    value_row,
    is_key,
    is_value,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Stores vectors, the halves of their elements [H, BLOCK_HALF] each, in four bits.

    Args:
        key_row, value_row: [H] int64, the vector's place in the cache if it is a key or a value.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    HALF_BYTES: tl.constexpr = HALF // 2
    GROUPS: tl.constexpr = (HEAD_DIM + _INT4_GROUP - 1) // _INT4_GROUP
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    low_minimum, low_scale = tl.zeros_like(low), tl.zeros_like(low)
    high_minimum, high_scale = tl.zeros_like(low), tl.zeros_like(low)
    for group in tl.static_range(GROUPS):
        in_low = (dims < HALF) & (dims // _INT4_GROUP == group)
        in_high = (dims < HALF) & ((dims + HALF) // _INT4_GROUP == group)
        lowest = tl.minimum(tl.where(in_low, low, float("inf")), tl.where(in_high, high, float("inf")))
        highest = tl.maximum(tl.where(in_low, low, -float("inf")), tl.where(in_high, high, -float("inf")))
        # Codes are chosen for the minimum and the scale as they are stored.
        minimum = tl.min(lowest, 1).to(tl.float16)
        span = tl.max(highest, 1) - minimum.to(tl.float32)
        scale = tl.maximum(tl.div_rn(span, _INT4_LARGEST), 0.0).to(tl.float16)
        key_place, value_place = (key_row * GROUPS + group) * 2, (value_row * GROUPS + group) * 2
        tl.store(key_scales + key_place, scale, mask=is_key)
        tl.store(key_scales + key_place + 1, minimum, mask=is_key)
        tl.store(value_scales + value_place, scale, mask=is_value)
        tl.store(value_scales + value_place + 1, minimum, mask=is_value)
        scales, minimums = scale.to(tl.float32)[:, None], minimum.to(tl.float32)[:, None]
        low_scale, low_minimum = tl.where(in_low, scales, low_scale), tl.where(in_low, minimums, low_minimum)
        high_scale = tl.where(in_high, scales, high_scale)
        high_minimum = tl.where(in_high, minimums, high_minimum)
    low_pairs = _int4_codes(low, low_minimum, low_scale)
    high_pairs = _int4_codes(high, high_minimum, high_scale)
    places = tl.arange(0, BLOCK_HALF // 2)[None, :]
    key_target, value_target = (
        keys + key_row[:, None] * HALF + places,
        values + value_row[:, None] * HALF + places,
    )
    key_mask = is_key[:, None] & (places < HALF_BYTES)
    value_mask = is_value[:, None] & (places < HALF_BYTES)
    tl.store(key_target, low_pairs, mask=key_mask)
    tl.store(key_target + HALF_BYTES, high_pairs, mask=key_mask)
    tl.store(value_target, low_pairs, mask=value_mask)
    tl.store(value_target + HALF_BYTES, high_pairs, mask=value_mask)


@triton.jit
def _rotate_and_write_kernel(
    heads,
    positions,
    cosine,
    sine,
    query_norm,
    key_norm,
    epsilon,
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HADAMARD_LEVELS: tl.constexpr,
    QUERY_FACTOR: tl.constexpr,
    KEY_FACTOR: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_HALF: tl.constexpr = triton.next_power_of_2(HALF)
    TOTAL: tl.constexpr = NUM_HEADS + 2 * KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_HALF)
    is_dim = dims < HALF
    is_query = head < NUM_HEADS
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + KV_HEADS)
    is_value = (head >= NUM_HEADS + KV_HEADS) & (head < TOTAL)
    offsets = head[:, None] * HEAD_DIM + dims[None, :]
    mask = (head < TOTAL)[:, None] & is_dim[None, :]
    source = heads + token * (TOTAL * HEAD_DIM)
    low = tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF + offsets, mask=mask, other=0.0).to(tl.float32)
    dtype = heads.dtype.element_ty
    if query_norm is not None:
        squares = tl.sum(low * low + high * high, 1) * (1.0 / HEAD_DIM)
        factor = tl.where(is_value, 1.0, tl.rsqrt(squares + epsilon))[:, None]
        for_query, for_key = is_query[:, None] & is_dim[None, :], is_key[:, None] & is_dim[None, :]
        low_weight = tl.load(query_norm + dims[None, :], mask=for_query, other=1.0).to(tl.float32)
        low_weight *= tl.load(key_norm + dims[None, :], mask=for_key, other=1.0).to(tl.float32)
        high_weight = tl.load(query_norm + HALF + dims[None, :], mask=for_query, other=1.0).to(tl.float32)
        high_weight *= tl.load(key_norm + HALF + dims[None, :], mask=for_key, other=1.0).to(tl.float32)
        low = (low * factor * low_weight).to(dtype).to(tl.float32)
        high = (high * factor * high_weight).to(dtype).to(tl.float32)
    position = tl.load(positions + token)
    c = tl.load(cosine + position * HALF + dims, mask=is_dim, other=0.0)[None, :]
    s = tl.load(sine + position * HALF + dims, mask=is_dim, other=0.0)[None, :]
    rotated_low = tl.where(is_value[:, None], low, low * c - high * s)
    rotated_high = tl.where(is_value[:, None], high, high * c + low * s)
    stored_type = keys.dtype.element_ty
    if stored_type == tl.int8:
        factor = tl.where(is_query, QUERY_FACTOR, KEY_FACTOR)[:, None]
        spread_low, spread_high = spread_halves(rotated_low, rotated_high, factor, HADAMARD_LEVELS)
        rotated_low = tl.where(is_value[:, None], rotated_low, spread_low)
        rotated_high = tl.where(is_value[:, None], rotated_high, spread_high)

    target = queries + token * (NUM_HEADS * HEAD_DIM)
    query_mask = is_query[:, None] & is_dim[None, :]
    tl.store(target + offsets, rotated_low.to(dtype), mask=query_mask)
    tl.store(target + HALF + offsets, rotated_high.to(dtype), mask=query_mask)

    row = tl.load(slots + token).to(tl.int64) * KV_HEADS
    # In the cache a token's key heads follow each other as they do here, and so do its value heads.
    key_row, value_row = row + (head - NUM_HEADS), row + (head - NUM_HEADS - KV_HEADS)
    if stored_type == tl.uint8:
        _write_int4(
            rotated_low,
            rotated_high,
            keys,
            values,
            key_scales,
            value_scales,
            key_row,
            value_row,
            is_key,
            is_value,
            HEAD_DIM,
            BLOCK_HALF,
        )
    else:
        if key_scales is not None:
            absmax = tl.max(tl.maximum(tl.abs(rotated_low), tl.abs(rotated_high)), 1)
            scale = tl.maximum(tl.div_rn(absmax, 127.0), _TINY)
            rotated_low = tl.div_rn(rotated_low, scale[:, None]) + _ROUNDER - _ROUNDER
            rotated_high = tl.div_rn(rotated_high, scale[:, None]) + _ROUNDER - _ROUNDER
            tl.store(key_scales + key_row, scale, mask=is_key)
            tl.store(value_scales + value_row, scale, mask=is_value)
        if stored_type == tl.float8e4nv:
            rotated_low = tl.minimum(tl.maximum(rotated_low, -_FP8_MAX), _FP8_MAX)
            rotated_high = tl.minimum(tl.maximum(rotated_high, -_FP8_MAX), _FP8_MAX)
        key_target = keys + key_row[:, None] * HEAD_DIM + dims[None, :]
        value_target = values + value_row[:, None] * HEAD_DIM + dims[None, :]
        key_mask = is_key[:, None] & is_dim[None, :]
        value_mask = is_value[:, None] & is_dim[None, :]
        tl.store(key_target, rotated_low.to(stored_type), mask=key_mask)
        tl.store(key_target + HALF, rotated_high.to(stored_type), mask=key_mask)
        tl.store(value_target, rotated_low.to(stored_type), mask=value_mask)
        tl.store(value_target + HALF, rotated_high.to(stored_type), mask=value_mask)


def rotate_and_write_in_triton(
    heads: torch.Tensor,
    positions: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    layer: KVLayer,
    slots: torch.Tensor,
    num_kv_heads: int,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    epsilon: float,
) -> torch.Tensor:
    """`rotate_and_write` in one launch, in float32 and rounded once."""
    target = target_of(heads)
    assert target is not None
    num_tokens, total, head_dim = heads.shape
    num_heads = total - 2 * num_kv_heads
    query_factor, key_factor = hadamard_factors(head_dim)
    queries = heads.new_empty(num_tokens, num_heads, head_dim)
    tile = select_tile(target, "rotate_and_write", num_tokens)
    launch(
        _rotate_and_write_kernel,
        (num_tokens, triton.cdiv(total, tile["BLOCK_H"])),
        {
            "heads": heads,
            "positions": positions,
            "cosine": cosine,
            "sine": sine,
            "query_norm": query_norm,
            "key_norm": key_norm,
            "epsilon": epsilon,
            "queries": queries,
            "keys": layer.keys,
            "values": layer.values,
            "key_scales": layer.key_scales,
            "value_scales": layer.value_scales,
            "slots": slots,
        },
        tile,
        NUM_HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HADAMARD_LEVELS=hadamard_levels(head_dim),
        QUERY_FACTOR=query_factor,
        KEY_FACTOR=key_factor,
    )
    return queries
