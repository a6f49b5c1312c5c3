"""Root mean square layer normalization (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + epsilon) * weight over the last dimension, computed in float32."""
    values = x.float()
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + epsilon)
    return (values * weight.float()).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm over the last dimension: x [..., H], weight [H] → [..., H] of x's dtype."""
    return F.rms_norm(x, weight.shape, weight, epsilon)
