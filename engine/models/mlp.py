"""The gated MLP of a decoder layer."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.operands import Activations, Format
from engine.models.config import ModelConfig
from engine.models.linear import Linear, build_linear
from engine.models.modules import ROLES
from engine.parallel.group import TensorGroup
from engine.quant.plan import QuantizationPlan


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product.

    Args:
        prefix: The layer's name in a checkpoint, like "model.layers.0".

    Attributes:
        gate_up, down: Its projections, of `engine.models.modules`.
        format: What `down` wants.
    """

    gate_up: Linear
    down: Linear

    def __init__(
        self, prefix: str, config: ModelConfig, quantization: QuantizationPlan, group: TensorGroup
    ) -> None:
        super().__init__()
        for role in ROLES:
            if role.block == "MLP":
                self.add_module(role.name, build_linear(role, prefix, config, quantization, group))
        self.format: Format = None
        self.activation = {"silu": silu_mul, "gelu_tanh": gelu_mul}[config.activation]

    def forward(self, x: Activations) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        return self.down(self.activation(self.gate_up(x), self.format))
