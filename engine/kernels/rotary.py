"""Rotary position embedding (Su et al. 2021) in the half-rotation layout of Hugging Face checkpoints."""

from __future__ import annotations

import torch


def apply_rotary(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotates each head by its token's position.

    Args:
        heads: [T, heads, head_dim].
        cosine: [T, 1, head_dim], both halves alike.
        sine: [T, 1, head_dim], the first half negated, so that the rotation is one roll and two products.
    """
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, dims=-1), sine)
