"""RMSNorm as a layer."""

from __future__ import annotations

import torch

from engine.kernels.norm import rms_norm
from engine.layers.linear import ReadWeight, StoredLayer


class RMSNorm(StoredLayer):
    """Root mean square normalization with a learned weight.

    Args:
        offset: Added to the checkpoint's weight on loading (Gemma stores w - 1).
    """

    def __init__(self, source: str, size: int, epsilon: float, offset: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.source, self.epsilon, self.offset, self.dtype = source, epsilon, offset, dtype
        self.register_buffer("weight", torch.empty(size, dtype=dtype, device="meta"))
        self.weight: torch.Tensor

    def load(self, read: ReadWeight) -> None:
        weight = read(f"{self.source}.weight")
        assert isinstance(weight, torch.Tensor)
        self.weight = (weight.float() + self.offset).to(self.dtype)

    def randomize(self, device: torch.device) -> None:
        self.weight = torch.ones(self.weight.shape, dtype=self.dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes the last dimension, x [..., size]."""
        return rms_norm(x, self.weight, self.epsilon)
