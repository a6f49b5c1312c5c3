"""Float activations × weights of four bits that stand for values of a codebook, in torch's operators.

w[n, k] = codebook[n or 0, codes[n, k]] * scale[n, k // 64], or codebook[n or 0, codes[n, k]] without a scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.kernels.nibbles import unpack_nibbles

SCALE_SIZE = 64
"""Elements along K that share a scale."""


def dequantize(
    codes: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor | None, in_features: int
) -> torch.Tensor:
    """[N, K] float32 from nibbles [N, ceil(K / 2)] uint8, codebook [N or 1, 16] and scale [N, groups] or None."""
    values = codebook.float().expand(len(codes), -1).gather(1, unpack_nibbles(codes)[:, :in_features].long())
    if scale is None:
        return values
    return values * scale.repeat_interleave(SCALE_SIZE, dim=1)[:, :in_features]


def reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[M, K] float × weight + bias [N] → [M, N], in float32 with values of x's type."""
    weight = dequantize(codes, codebook.to(x.dtype), scale, x.shape[1])
    return F.linear(x.float(), weight, bias).to(x.dtype)
