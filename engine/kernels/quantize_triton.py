"""The Triton body of `engine.kernels.quantize`.

The other kernels that write activations (norm, gated activation) write their rows with `write_row`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import Tile, launch
from engine.kernels.matmul.group_sums_triton import sum_groups
from engine.kernels.operands import (
    SUM_SIZE,
    Activations,
    Format,
    GroupSums,
    Int8Activations,
    Int8Format,
    SumsFormat,
)
from engine.kernels.quantize import LOW_STEPS, TINY
from engine.kernels.rotation_triton import rotate_columns

_LOW_STEPS: tl.constexpr = tl.constexpr(LOW_STEPS)

_TINY: tl.constexpr = tl.constexpr(TINY)


def quantize_in_triton(x: torch.Tensor, format: Int8Format) -> Int8Activations:
    """`quantize_per_token` in one launch."""
    y = write_in_triton(x, format)
    assert isinstance(y, Int8Activations)
    return y


def write_in_triton(x: torch.Tensor, format: Format) -> Activations:
    """x [M, K] float, K contiguous, in a format that a product wants, in one launch."""
    num_tokens, in_features = x.shape
    y = empty_activations(num_tokens, in_features, x, format)
    tile = row_tile(in_features)
    launch(
        _quantize_kernel,
        (num_tokens,),
        {"x": x, **outputs(y), "stride": x.stride(0), "in_features": in_features},
        tile,
        GROUP=group_of(format, tile["BLOCK"]),
        ROTATED=is_rotated(format),
    )
    return y


@triton.jit
def _quantize_kernel(
    x,
    output,
    low,
    scale,
    stride,
    in_features,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + columns, columns < in_features, 0.0).to(tl.float32)
    write_row(values, row, 0, in_features, output, low, scale, BLOCK, GROUP, ROTATED)


def row_tile(columns: int) -> Tile:
    """The launch of one program a row, all of it in registers.

    Code rather than data: it decides the order of a row's sum, and may depend on nothing but the row's size.
    """
    block = max(triton.next_power_of_2(columns), 128)
    return Tile({"BLOCK": block}, num_warps=max(1, min(block // 256, 16)), num_stages=1)


def group_of(format: Format, block: int) -> int:
    """The constant GROUP of `write_row`, for programs that take `block` columns."""
    match format:
        case Int8Format():
            return format.group_size or block
        case None:
            return block
    return SUM_SIZE


def is_rotated(format: Format) -> bool:
    """The constant ROTATED of `write_row`."""
    return isinstance(format, SumsFormat) and format.is_rotated


def empty_activations(num_tokens: int, columns: int, like: torch.Tensor, format: Format) -> Activations:
    """Activations [num_tokens, columns] for a kernel to write, of `like`'s dtype on its device."""
    device = like.device
    if isinstance(format, Int8Format):
        codes = torch.empty(num_tokens, format.terms, columns, dtype=torch.int8, device=device)
        groups = triton.cdiv(columns, format.group_size or columns)
        scale = torch.empty(num_tokens, groups, dtype=torch.float32, device=device)
        low = codes[:, 1] if format.terms == 2 else None
        return Int8Activations(codes[:, 0], low, scale, like.dtype)
    values = torch.empty(num_tokens, columns, dtype=like.dtype, device=device)
    if format is None:
        return values
    sums = torch.empty(num_tokens, triton.cdiv(columns, SUM_SIZE), dtype=torch.float32, device=device)
    return GroupSums(values, sums)


def outputs(y: Activations) -> dict[str, torch.Tensor | None]:
    """The arguments output, low and scale of `write_row`."""
    match y:
        case Int8Activations():
            return {"output": y.high, "low": y.low, "scale": y.scale}
        case GroupSums():
            return {"output": y.values, "low": None, "scale": y.sums}
    assert isinstance(y, torch.Tensor)
    return {"output": y, "low": None, "scale": None}


@triton.jit
def write_row(
    values,
    row,
    first,
    num_columns,
    output,
    low,
    scale,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Writes columns [first, first + BLOCK) of a row in the format that the outputs tell.

    values [BLOCK] float32, which the floats' type holds exactly, zeros from num_columns on; row int64;
    output [M, K] int8 (with low, rows of both terms alternate) and scale [M, groups] float32, or
    output [M, K] float and scale (the sums) [M, ceil(K / GROUP)] or None; these may be rotated, where first and
    BLOCK are multiples of a rotation's block.
    """
    columns = first + tl.arange(0, BLOCK)
    groups = first // GROUP + tl.arange(0, BLOCK // GROUP)
    num_groups = tl.cdiv(num_columns, GROUP)
    is_column = columns < num_columns
    is_int8: tl.constexpr = output.dtype.element_ty == tl.int8
    if is_int8:
        high_codes, low_codes, group_scale = _quantize(tl.reshape(values, (BLOCK // GROUP, GROUP)))
        offsets = row * num_columns + columns
        if low is not None:
            offsets += row * num_columns
            tl.store(low + offsets, tl.reshape(low_codes, (BLOCK,)), is_column)
        tl.store(output + offsets, tl.reshape(high_codes, (BLOCK,)), is_column)
        tl.store(scale + row * num_groups + groups, group_scale, groups < num_groups)
    else:
        if ROTATED:
            rotated = rotate_columns(values, columns, num_columns)
            values = rotated.to(output.dtype.element_ty).to(tl.float32)
        tl.store(output + row * num_columns + columns, values.to(output.dtype.element_ty), is_column)
        if scale is not None:
            tl.store(scale + row * num_groups + groups, sum_groups(values, GROUP), groups < num_groups)


@triton.jit
def _quantize(values):
    """[groups, group] float32 → high and low int8 of the same shape, scale [groups] float32."""
    # The bits of floats without a sign are ordered like their values, a NaN above infinity.
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    is_finite = bits < 0x7F800000
    scale = tl.maximum(bits.to(tl.float32, bitcast=True) * (1 / 127), _TINY)
    steps = tl.where(
        is_finite[:, None], tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape)), 0.0
    )
    high = _round(steps)
    low = _round((steps - high) * _LOW_STEPS)
    return high.to(tl.int8), low.to(tl.int8), tl.where(is_finite, scale, float("nan"))


@triton.jit
def _round(x):
    """The nearest integer, ties to even, of |x| < 2^22: beside 1.5 * 2^23 there are no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0
