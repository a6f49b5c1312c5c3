"""The gated MLP of a decoder layer."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.operands import Activations, Format
from engine.models.config import ModelConfig
from engine.models.linear import Linear
from engine.models.splits import ColumnParallel, row_parallel
from engine.parallel.group import TensorGroup
from engine.quant.plan import QuantizationPlan


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product.

    Attributes:
        format: What `down` wants.
    """

    def __init__(
        self, prefix: str, config: ModelConfig, quantization: QuantizationPlan, group: TensorGroup
    ) -> None:
        super().__init__()
        hidden, inner, has_bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        gate_up, down = [f"{prefix}.gate_proj", f"{prefix}.up_proj"], [f"{prefix}.down_proj"]
        self.gate_up = Linear(
            gate_up, hidden, [inner, inner], quantization.scheme(gate_up), has_bias, ColumnParallel(group)
        )
        scheme = quantization.scheme(down)
        self.down = Linear(
            down, inner, [hidden], scheme, has_bias, row_parallel(group, inner, hidden, scheme)
        )
        self.format: Format = None
        self.activation = {"silu": silu_mul, "gelu_tanh": gelu_mul}[config.activation]

    def forward(self, x: Activations) -> torch.Tensor:
        """[T, hidden] → [T, hidden]."""
        return self.down(self.activation(self.gate_up(x), self.format))
