"""The Triton body of `engine.kernels.norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import launch
from engine.kernels.operands import Activations, Format
from engine.kernels.quantize_triton import (
    empty_activations,
    group_of,
    is_rotated,
    outputs,
    row_tile,
    write_row,
)


def rms_norm_in_triton(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, format: Format, delta: torch.Tensor | None
) -> Activations:
    """`rms_norm` of two or three dimensions, the outer ones perhaps strided."""
    assert x.dim() in (2, 3)
    assert delta is None or delta.is_contiguous()
    size = x.shape[-1]
    num_heads = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * num_heads
    y = empty_activations(num_rows, size, x, format)
    tile = row_tile(size)
    launch(
        _rms_norm_kernel,
        (num_rows,),
        {
            "x": x,
            "delta": delta,
            "weight": weight,
            **outputs(y),
            "epsilon": epsilon,
            "token_stride": x.stride(0),
            "head_stride": x.stride(1) if x.dim() == 3 else 0,
            "num_heads": num_heads,
            "size": size,
        },
        tile,
        GROUP=group_of(format, tile["BLOCK"]),
        ROTATED=is_rotated(format),
    )
    return y.view(x.shape) if isinstance(y, torch.Tensor) else y


@triton.jit
def _rms_norm_kernel(
    x,
    delta,
    weight,
    output,
    low,
    scale,
    epsilon,
    token_stride,
    head_stride,
    num_heads,
    size,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    ROTATED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_column = columns < size
    x += (row // num_heads) * token_stride + (row % num_heads) * head_stride + columns
    dtype: tl.constexpr = x.dtype.element_ty
    values = tl.load(x, is_column, 0.0).to(tl.float32)
    if delta is not None:
        added = tl.load(delta + row * size + columns, is_column, 0.0).to(tl.float32)
        rounded = (values + added).to(dtype)
        tl.store(x, rounded, is_column)
        values = rounded.to(tl.float32)
    weights = tl.load(weight + columns, is_column, 0.0).to(tl.float32)
    mean = tl.sum(values * values) / size
    values = values * tl.div_rn(1.0, tl.sqrt_rn(mean + epsilon)) * weights
    write_row(values.to(dtype).to(tl.float32), row, 0, size, output, low, scale, BLOCK, GROUP, ROTATED)
