"""RMSNorm as a layer, with the residual sum before it."""

from __future__ import annotations

import torch

from engine.kernels.norm import rms_norm
from engine.kernels.operands import Activations, Format
from engine.models.linear import ReadWeight, StoredLayer
from engine.parallel.shards import WHOLE


class RMSNorm(StoredLayer):
    """Root mean square normalization with a learned weight.

    Args:
        offset: Added to the checkpoint's weight on loading (Gemma stores w - 1).

    Attributes:
        format: What the product behind the norm wants.
    """

    def __init__(self, source: str, size: int, epsilon: float, offset: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.source, self.epsilon, self.offset, self.dtype = source, epsilon, offset, dtype
        self.register_buffer("weight", torch.empty(size, dtype=dtype, device="meta"))
        self.weight: torch.Tensor
        self.format: Format = None

    def load(self, read: ReadWeight) -> None:
        weight = read(f"{self.source}.weight", WHOLE)
        assert isinstance(weight, torch.Tensor)
        self.weight = (weight.float() + self.offset).to(self.dtype)

    def randomize(self, device: torch.device) -> None:
        self.weight = torch.ones(self.weight.shape, dtype=self.dtype, device=device)

    def forward(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> Activations:
        """Normalizes the last dimension, x [..., size]; `delta` is added to x in place before."""
        return rms_norm(x, self.weight, self.epsilon, self.format, delta)
