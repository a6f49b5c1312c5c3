"""Quantization of activations as they come: one or two int8 terms, one scale a token or a group of a token.

    x[m, k] ≈ (high[m, k] + low[m, k] / 254) * scale[m, group]        scale = max |x| / 127 over the group

The low term holds what rounding to the high one leaves, at most half a step, on a grid 254 times finer: nearly
the quality of the floats. Both terms of a token lie side by side, so that a product of two terms is a product
of one with twice the rows.

On a CPU the second term is sparse: the scale holds most elements of a token rather than all, and the few that it
cannot hold get a high term, whose products are added for these elements alone.

    x[m, k] = (128 * high[m, k] + low[m, k]) * scale[m]

The other kernels that write activations (norm, gated activation) write their rows with `write_row`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels import cpu
from engine.kernels.cpu.signatures import Argument
from engine.kernels.launch import Tile, launch, runs_triton
from engine.kernels.matmul.group_sums import sum_groups
from engine.kernels.operands import (
    SUM_SIZE,
    Activations,
    Format,
    GroupSums,
    Int8Activations,
    Int8Format,
    SparseInt8Activations,
    SparseInt8Format,
)

LOW_STEPS = 254
"""Steps of the low term in one step of the high term: the remainder is at most half a step, 127 low ones."""

TINY = torch.finfo(torch.float32).tiny
"""The smallest scale. A group of zeros keeps codes of 0; the smallest normal float avoids 0 / 0."""

HIGH_STEPS = 128
"""Steps of the low term in one step of the sparse high term."""

SPREAD_BLOCK = 32
"""Elements along K whose largest is one of those that the scale of a token is the median of."""

_LOW_STEPS: tl.constexpr = tl.constexpr(LOW_STEPS)
_TINY: tl.constexpr = tl.constexpr(TINY)


def reference(x: torch.Tensor, format: Int8Format) -> Int8Activations:
    """`quantize_per_token` in torch's operators."""
    num_tokens, in_features = x.shape
    group_size = format.group_size or in_features
    groups = x.float()
    if in_features % group_size:
        groups = F.pad(groups, (0, -in_features % group_size))
    groups = groups.view(num_tokens, -1, group_size)
    scale = torch.linalg.vector_norm(groups, torch.inf, dim=-1, keepdim=True).mul_(1 / 127)
    # What is not finite shows in the product.
    scale = torch.where(scale.isfinite(), scale.clamp_(min=TINY), torch.nan)
    steps = groups / scale
    high = steps.round()
    terms = [high] if format.terms == 1 else [high, steps.sub_(high).mul_(LOW_STEPS).round_()]
    codes = [term.to(torch.int8).view(num_tokens, -1)[:, :in_features] for term in terms]
    return Int8Activations(codes[0], codes[1] if format.terms == 2 else None, scale.squeeze(2), x.dtype)


def sparse_reference(x: torch.Tensor, format: SparseInt8Format) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] float → high and low terms [2, M, K] float32 and scale [M, 1] float32, NaN where x is not finite."""
    x = x.float()
    blocks = F.pad(x, (0, -x.shape[1] % SPREAD_BLOCK)).unflatten(1, (-1, SPREAD_BLOCK)).abs().amax(dim=2)
    # torch's median is the lower one.
    median, largest = blocks.median(dim=1, keepdim=True).values, blocks.amax(dim=1, keepdim=True)
    scale = largest * (1 / 127) if math.isinf(format.spread) else median * (format.spread / 127)
    scale = torch.maximum(scale, largest * (1 / (127 * HIGH_STEPS))).clamp(min=TINY)
    codes = torch.where(largest.isfinite(), x * (1 / scale), 0.0).round()
    high = torch.where(codes.abs() > 127, (codes / HIGH_STEPS).round(), 0.0)
    return torch.stack((high, codes - high * HIGH_STEPS)), torch.where(largest.isfinite(), scale, torch.nan)


def quantize_sparse(x: torch.Tensor, format: SparseInt8Format) -> SparseInt8Activations:
    """The C body: x [M, K] float32, K contiguous."""
    num_tokens, in_features = x.shape
    y = empty_sparse("quantize", num_tokens, in_features)
    cpu.run(
        "quantize",
        num_tokens,
        x=x,
        x_stride=x.stride(0),
        size=in_features,
        spread=format.spread / 127,
        **y.arguments(),
    )
    return y


def empty_sparse(owner: str, num_tokens: int, in_features: int) -> SparseInt8Activations:
    """Codes for the C body `owner` to write."""
    stride = in_features + -in_features % 64
    # The tile unit reads whole tiles of 16 tokens.
    rows = num_tokens + -num_tokens % 16
    return SparseInt8Activations(
        cpu.empty(owner, rows, stride, dtype=torch.int8)[:num_tokens],
        cpu.empty(owner, num_tokens, 4, dtype=torch.int32),
        cpu.empty(owner, num_tokens, stride // 4, 2, dtype=torch.int32),
    )


def cpu_outputs(
    owner: str, num_tokens: int, in_features: int, format: Format
) -> tuple[Activations, dict[str, Argument]]:
    """What the C body `owner` writes, and the arguments that say so: floats or codes, and the codes' spread."""
    if isinstance(format, SparseInt8Format):
        codes = empty_sparse(owner, num_tokens, in_features)
        return codes, {"output": None, "spread": format.spread / 127, **codes.arguments()}
    assert format is None
    y = cpu.empty(owner, num_tokens, in_features)
    return y, {"output": y, "spread": 0.0, "low": None, "tokens": None, "quads": None, "stride": 0}


def quantize_per_token(x: torch.Tensor, format: Int8Format) -> Int8Activations:
    """x [M, K] float, K contiguous → its int8 terms.

    A token (or group) with a NaN or an infinity gets the scale NaN.
    """
    if not runs_triton(x):
        return reference(x, format)
    num_tokens, in_features = x.shape
    y = empty_activations(num_tokens, in_features, x, format)
    assert isinstance(y, Int8Activations)
    tile = row_tile(in_features)
    launch(
        _quantize_kernel,
        (num_tokens,),
        {"x": x, **outputs(y), "stride": x.stride(0), "in_features": in_features},
        tile,
        GROUP=group_of(format, tile["BLOCK"]),
    )
    return y


@triton.jit
def _quantize_kernel(x, output, low, scale, stride, in_features, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride + columns, columns < in_features, 0.0).to(tl.float32)
    write_row(values, row, 0, in_features, output, low, scale, BLOCK, GROUP)


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
def write_row(values, row, first, num_columns, output, low, scale, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Writes columns [first, first + BLOCK) of a row in the format that the outputs tell.

    values [BLOCK] float32, which the floats' type holds exactly, zeros from num_columns on; row int64;
    output [M, K] int8 (with low, rows of both terms alternate) and scale [M, groups] float32, or
    output [M, K] float and scale (the sums) [M, ceil(K / GROUP)] or None.
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
