"""Root mean square layer normalization (Zhang and Sennrich 2019), with the residual's addition before it and
the format that the next product wants behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels import cpu
from engine.kernels.launch import launch, runs_triton
from engine.kernels.operands import Activations, Format
from engine.kernels.quantize import cpu_outputs, empty_activations, group_of, outputs, row_tile, write_row


def reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight over the last dimension, computed in float32."""
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + epsilon)
    return (values * weight.float()).to(x.dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    format: Format = None,
    delta: torch.Tensor | None = None,
) -> Activations:
    """RMSNorm over the last dimension.

    Args:
        x: [..., H] float with H contiguous; for a Triton kernel of two or three dimensions, the outer ones perhaps
            strided; for a C kernel contiguous.
        weight: [H].
        format: Written by Triton's and C's kernels for x [M, H]; torch's operators return floats.
        delta: Like x, contiguous; added to x in place before, rounded to x's dtype.

    Returns:
        [..., H] of x's dtype, contiguous. What is quantized or summed are the values rounded to x's dtype.
    """
    if runs_triton(x):
        return _triton_rms_norm(x, weight, epsilon, format, delta)
    if not cpu.serves(x, weight):
        if delta is not None:
            x.add_(delta)
        return F.rms_norm(x, weight.shape, weight, epsilon)
    assert x.is_contiguous()
    assert delta is None or delta.is_contiguous()
    size = weight.shape[0]
    num_rows = x.numel() // size
    y, outputs_of_c = cpu_outputs("rms_norm", num_rows, size, format)
    cpu.run("rms_norm", num_rows, x=x, delta=delta, weight=weight, epsilon=epsilon, size=size, **outputs_of_c)
    return y.view(x.shape) if isinstance(y, torch.Tensor) else y


def add(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """x + delta, in place: [M, H] each."""
    if x.is_meta or not cpu.serves(x, delta):
        return x.add_(delta)
    cpu.run("add", x.shape[0], x=x, delta=delta, size=x.shape[1])
    return x


def _triton_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, format: Format, delta: torch.Tensor | None
) -> Activations:
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
    write_row(values.to(dtype).to(tl.float32), row, 0, size, output, low, scale, BLOCK, GROUP)
