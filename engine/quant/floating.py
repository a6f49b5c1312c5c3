"""Float: weights in the activations' own type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import Weight, to_float


@dataclass(frozen=True)
class Float:
    """Weights as `dtype`, multiplied by torch."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def storage(self, out_features: int, in_features: int) -> Tensors:
        return {"weight": torch.empty(out_features, in_features, dtype=self.dtype, device="meta")}

    def quantize(self, weight: Weight) -> Tensors:
        return {"weight": to_float(weight).to(self.dtype)}

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        weight = torch.empty(out_features, in_features, dtype=self.dtype, device=device)
        return {"weight": weight.normal_(std=in_features**-0.5)}

    def bind(self, tensors: Tensors) -> Matmul:
        weight = tensors["weight"]
        return lambda x: F.linear(x, weight)

    def lookup(self, tensors: Tensors, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight: token_ids [T] → [T, K]."""
        return F.embedding(token_ids, tensors["weight"])
