"""The gated MLP of a decoder layer."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.activations import Activations, Format
from engine.layers.linear import Linear
from engine.models.config import ModelConfig
from engine.quant import QuantizationPlan


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product.

    Attributes:
        format: What `down` wants.
    """

    def __init__(self, prefix: str, config: ModelConfig, quantization: QuantizationPlan) -> None:
        super().__init__()
        scheme, size, has_bias = quantization.linear, config.intermediate_size, config.has_mlp_bias
        self.gate_up = Linear(
            [f"{prefix}.gate_proj", f"{prefix}.up_proj"], config.hidden_size, [size, size], scheme, has_bias
        )
        self.down = Linear([f"{prefix}.down_proj"], size, [config.hidden_size], scheme, has_bias)
        self.format: Format = None
        self.activation = {"silu": silu_mul, "gelu_tanh": gelu_mul}[config.activation]

    def forward(self, x: Activations) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        return self.down(self.activation(self.gate_up(x), self.format))
