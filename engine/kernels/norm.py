"""Root mean square layer normalization (Zhang and Sennrich 2019), with the residual's addition before it and
the format that the next product wants behind it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.kernels import cpu
from engine.kernels.launch import runs_triton
from engine.kernels.operands import Activations, Format
from engine.kernels.quantize import cpu_outputs


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
        from engine.kernels.norm_triton import rms_norm_in_triton

        return rms_norm_in_triton(x, weight, epsilon, format, delta)
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
