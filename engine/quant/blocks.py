"""Blocks: a weight on the grid of its GGUF type, stored and multiplied as it is.

The types are those of `engine.quant.block_weight`; nothing is rounded again. On a CPU the sums of a group are exact
integers; on a GPU activations are floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.errors import ConfigError
from engine.kernels.launch import runs_triton
from engine.kernels.matmul.cpu_grouped import CpuGroupedMatmul
from engine.quant.block_weight import BLOCK_TYPES, BlockWeight
from engine.quant.cpu_formats import CPU_ACTIVATIONS
from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import Weight


@dataclass(frozen=True)
class Blocks:
    """Weights of one type.

    Attributes:
        name: A key of `BLOCK_TYPES`.
    """

    name: str
    integer_sums: ClassVar[None] = None

    def storage(self, out_features: int, in_features: int) -> Tensors:
        return BLOCK_TYPES[self.name].parts(out_features, in_features)

    def quantize(self, weight: Weight) -> Tensors:
        """
        Raises:
            ConfigError: The weight is not of the type, nothing here makes such of floats; or a rank cuts its blocks.
        """
        if not isinstance(weight, BlockWeight) or weight.kind != self.name:
            raise ConfigError(
                f"quant: {self.name} keeps weights of a GGUF file that are of that type, in blocks that no rank "
                "cuts: take int4 or int8:g32, or leave --no-exact-reduce out"
            )
        return {name: part.contiguous() for name, part in weight.parts.items()}

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        of_type = BLOCK_TYPES[self.name]
        parts = of_type.parts(out_features, in_features, device)
        parts["codes"].random_(0, 256 if of_type.bits == 4 else 1 << of_type.bits)
        if of_type.values:
            values = torch.tensor(of_type.values).double()
        else:
            values = torch.arange(1 << of_type.bits).double() - of_type.offset
        step = in_features**-0.5 / float(values.std())
        steps = 32 if of_type.block_size else 1
        for name, part in parts.items():
            if name.endswith("_steps"):
                part.fill_(steps)
        parts["scale"].fill_(step / steps)
        if of_type.has_minimum:
            parts["minimum"].fill_(-step / steps * float(values.mean()))
        return parts

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        of_type, codes = BLOCK_TYPES[self.name], tensors["codes"]
        in_features = codes.shape[1] * (2 if of_type.bits == 4 else 1)
        weight = of_type.grouped(tensors, in_features)
        if runs_triton(codes):
            from engine.kernels.matmul.blocks_triton import BlockMatmul

            return BlockMatmul(weight, bias)
        return CpuGroupedMatmul(weight, None, bias, CPU_ACTIVATIONS)
