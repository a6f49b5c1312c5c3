"""Products with weights that are stored rotated in blocks along K: their activations are rotated, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from engine.kernels.launch import runs_triton
from engine.kernels.operands import Activations, Format, SparseInt8Format, SumsFormat
from engine.kernels.quantize import quantize_sparse
from engine.kernels.rotation import rotate


class RotatedMatmul(nn.Module):
    """x Wᵀ from the product with W H (`engine.kernels.rotation`).

    Activations that come in the format are rotated; floats are rotated here, in the pass that quantizes them or adds
    up their groups.

    Args:
        matmul: The product with W H.
        format: What it takes ready-made: sparse int8 terms, floats with sums, or None.

    Attributes:
        format: The same of rotated activations.
    """

    def __init__(self, matmul: Callable[[Activations], torch.Tensor], format: Format) -> None:
        super().__init__()
        self.matmul = matmul
        self.format: Format = format
        if isinstance(format, SparseInt8Format | SumsFormat):
            self.format = replace(format, is_rotated=True)

    def forward(self, x: Activations) -> torch.Tensor:
        """[M, K] → [M, N] of the activations' dtype."""
        if isinstance(x, torch.Tensor):
            x = self._rotate(x)
        return self.matmul(x)

    def _rotate(self, x: torch.Tensor) -> Activations:
        if isinstance(self.format, SparseInt8Format):
            return quantize_sparse(x, self.format)
        if runs_triton(x):
            from engine.kernels.quantize_triton import write_in_triton

            return write_in_triton(x, self.format)
        return rotate(x)
