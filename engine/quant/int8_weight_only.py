"""Int8 weights × float activations.

    w[n, k] ≈ weight[n, k] * scale[n], or scale[n, k // group_size]         stored as by `Int8` and `Int8Groups`

On a GPU activations are multiplied as they are (`engine.kernels.matmul.weight_only`).

On a CPU they are not: its products are of integers, and a token's activations become integers of 15 bits, multiplied
as two int8 terms, which is what `Int8` and `Int8Groups` call "two-terms":

    x[m, k] ≈ q[m, k] * max_k |x[m, k]| / 16256

Measured on the products of SmolLM2-135M (all layers, 256 tokens of text), this changes a product by 2e-4 of its norm,
where one int8 term and scale a token change it by 2.6e-2, and the default's sparse second term by 5e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.kernels.launch import runs_triton
from engine.kernels.matmul.weight_only import WeightOnlyMatmul
from engine.quant.cpu_formats import cpu_grouped_product, cpu_product
from engine.quant.int8 import Int8
from engine.quant.int8_groups import Int8Groups, kernel_group_size, repeat_groups
from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import Weight


@dataclass(frozen=True)
class Int8WeightOnly:
    """int8 weights × float activations.

    Attributes:
        group_size: A multiple of 32; None for one scale a row.

    Raises:
        ConfigError: Another group size.
    """

    group_size: int | None = None
    integer_sums: ClassVar[None] = None

    def __post_init__(self) -> None:
        _ = self._stored

    @property
    def _stored(self) -> Int8 | Int8Groups:
        """The scheme that stores the same."""
        return Int8() if self.group_size is None else Int8Groups(self.group_size)

    @property
    def name(self) -> str:
        return f"{self._stored.name}-weight-only"

    def storage(self, out_features: int, in_features: int) -> Tensors:
        return self._stored.storage(out_features, in_features)

    def quantize(self, weight: Weight) -> Tensors:
        return self._stored.quantize(weight)

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        return self._stored.random(out_features, in_features, device)

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        weight, scale = tensors["weight"], tensors["scale"]
        if self.group_size is None:
            if runs_triton(weight):
                return WeightOnlyMatmul(weight, scale, None, bias)
            return cpu_product(weight, scale, bias, "two-terms")
        size = kernel_group_size(self.group_size)
        scale = repeat_groups(scale, self.group_size, size, weight.shape[1])
        if runs_triton(weight):
            return WeightOnlyMatmul(weight, scale.float(), size, bias)
        return cpu_grouped_product(weight, scale, size, bias, "two-terms")
