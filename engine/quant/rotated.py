"""Rotated: a scheme whose weights are stored as W H, with H Hadamard matrices in blocks along K.

What stands out of a group of weights, or of a token's activations, is spread over 128 of them before they are rounded
(`engine.kernels.rotation`). Storage and products are those of the scheme that W H is stored in; a norm or a gated
activation rotates what it writes for the products behind it, once for all that read it. Ranks that share K hold whole
blocks (`engine.models.sharding`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.kernels.matmul.rotated import RotatedMatmul
from engine.kernels.rotation import rotate
from engine.quant.int4 import Int4
from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import RotatedWeight, Weight, to_float


@dataclass(frozen=True)
class Rotated:
    """
    Attributes:
        stored: The scheme of W H.
    """

    stored: Int4
    integer_sums: ClassVar[None] = None

    @property
    def name(self) -> str:
        return f"{self.stored.name}-rotated"

    def storage(self, out_features: int, in_features: int) -> Tensors:
        return self.stored.storage(out_features, in_features)

    def quantize(self, weight: Weight) -> Tensors:
        if isinstance(weight, RotatedWeight):
            return self.stored.quantize(weight.grid)
        return self.stored.quantize(rotate(to_float(weight).float()))

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        return self.stored.random(out_features, in_features, device)

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        matmul = self.stored.bind(tensors, bias)
        return RotatedMatmul(matmul, matmul.format)
