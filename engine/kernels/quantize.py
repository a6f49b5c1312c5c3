"""Quantization of activations as they come: one or two int8 terms, one scale a token or a group of a token.

    x[m, k] ≈ (high[m, k] + low[m, k] / 254) * scale[m, group]        scale = max |x| / 127 over the group

The low term holds what rounding to the high one leaves, at most half a step, on a grid 254 times finer: nearly
the quality of the floats. Both terms of a token lie side by side, so that a product of two terms is a product
of one with twice the rows.

On a CPU the second term is sparse: the scale holds most elements of a token rather than all, and the few that it
cannot hold get a high term, whose products are added for these elements alone.

    x[m, k] = (128 * high[m, k] + low[m, k]) * scale[m]
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from engine.kernels import cpu
from engine.kernels.cpu.signatures import Argument
from engine.kernels.launch import runs_triton
from engine.kernels.operands import (
    Activations,
    Format,
    Int8Activations,
    Int8Format,
    SparseInt8Activations,
    SparseInt8Format,
)
from engine.kernels.rotation import rotate

LOW_STEPS = 254
"""Steps of the low term in one step of the high term: the remainder is at most half a step, 127 low ones."""

TINY = torch.finfo(torch.float32).tiny
"""The smallest scale. A group of zeros keeps codes of 0; the smallest normal float avoids 0 / 0."""

HIGH_STEPS = 128
"""Steps of the low term in one step of the sparse high term."""

SPREAD_BLOCK = 32
"""Elements along K whose largest is one of those that the scale of a token is the median of."""


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
    x = rotate(x.float()) if format.is_rotated else x.float()
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
        is_rotated=int(format.is_rotated),
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
        rotation = {"is_rotated": int(format.is_rotated)}
        return codes, {"output": None, "spread": format.spread / 127, **rotation, **codes.arguments()}
    assert format is None
    y = cpu.empty(owner, num_tokens, in_features)
    no_codes = {"is_rotated": 0, "spread": 0.0, "low": None, "tokens": None, "quads": None, "stride": 0}
    return y, {"output": y, **no_codes}


def quantize_per_token(x: torch.Tensor, format: Int8Format) -> Int8Activations:
    """x [M, K] float, K contiguous → its int8 terms.

    A token (or group) with a NaN or an infinity gets the scale NaN.
    """
    if not runs_triton(x):
        return reference(x, format)
    from engine.kernels.quantize_triton import quantize_in_triton

    return quantize_in_triton(x, format)
