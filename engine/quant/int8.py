"""Int8: one scale a row of the weight, two int8 terms a token of the activations, exact int32 sums.

    w[n, k] ≈ weight[n, k] * scale[n]                     scale[n] = max_k |w[n, k]| / 127
    x[m, k] ≈ (high[m, k] + low[m, k] / 254) * s[m]       s[m] = max_k |x[m, k]| / 127
    y[m, n] = (Σ_k high * weight + Σ_k low * weight / 254) * s[m] * scale[n]

The second term holds what rounding to the first leaves, at most half a step, on a grid 254 times finer: nearly
the quality of float activations for a second product over the same read of the weights. Both sums are sums
of integers, so their value does not depend on the order, the tiling or the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.int8_matmul import MAX_IN_FEATURES, Int8Matmul
from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import Weight, to_float


@dataclass(frozen=True)
class Int8:
    """Per-channel int8 weights × two-term int8 activations."""

    name: str = "int8"

    def storage(self, out_features: int, in_features: int) -> Tensors:
        if in_features > MAX_IN_FEATURES:
            raise ValueError(f"int8 sums of {in_features} products can overflow; at most {MAX_IN_FEATURES}")
        return {
            "weight": torch.empty(out_features, in_features, dtype=torch.int8, device="meta"),
            "scale": torch.empty(out_features, dtype=torch.float32, device="meta"),
        }

    def quantize(self, weight: Weight) -> Tensors:
        values = to_float(weight).float()
        scale = values.abs().amax(dim=1) / 127
        # A row of zeros gets the scale 1: its codes are zeros whatever they are multiplied by.
        scale = torch.where(scale > 0, scale, 1.0)
        return {"weight": (values / scale[:, None]).round().to(torch.int8), "scale": scale}

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        shape = (out_features, in_features)
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        # Uniform codes of -127 … 127 deviate by 73.3.
        scale = torch.full((out_features,), in_features**-0.5 / 73.3, device=device)
        return {"weight": codes, "scale": scale}

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        return Int8Matmul(tensors["weight"], tensors["scale"], bias)
