"""Float: weights in the activations' own type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from engine.kernels import cpu
from engine.kernels.embedding import lookup
from engine.kernels.launch import runs_triton
from engine.kernels.matmul.cpu_int8 import CpuFloatMatmul
from engine.kernels.matmul.weight_only import WeightOnlyMatmul
from engine.kernels.operands import Activations, Format
from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import Weight, to_float


@dataclass(slots=True)
class FloatMatmul:
    """torch's product: weight [N, K], bias [N] or None, of one type."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    format: Format = None

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] → [M, N]."""
        assert isinstance(x, torch.Tensor)
        return F.linear(x, self.weight, self.bias)

    def rows(self, token_ids: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
        """See `engine.quant.scheme.TableMatmul`."""
        return lookup(token_ids, self.weight, None, None, dtype, factor)


@dataclass(frozen=True)
class Float:
    """Weights as `dtype`, multiplied by torch.

    Attributes:
        batch_invariant: One form of the product for any number of tokens (`--deterministic`): our own, on a GPU.
    """

    dtype: torch.dtype
    batch_invariant: bool = False
    integer_sums: ClassVar[None] = None

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

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        weight = tensors["weight"]
        if self.batch_invariant and runs_triton(weight):
            return WeightOnlyMatmul(weight, None, None, bias)
        if cpu.packs(weight):
            return CpuFloatMatmul(weight, bias)
        return FloatMatmul(weight, None if bias is None else bias.to(weight.dtype))
