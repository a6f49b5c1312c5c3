"""Int8: one scale a row of the weight, int8 activations quantized as they come, exact int32 sums.

    w[n, k] ≈ weight[n, k] * scale[n]                     scale[n] = max_k |w[n, k]| / 127

How activations are quantized is a choice (`engine.quant_spec`); its price is in `engine.quant.cpu_formats`:

                on a GPU                                    on a CPU
    default     two int8 terms, one scale a token           one term, and a second where it does not hold an element
    token       one term, one scale a token                 the same
    groups      one term, a scale for each 32 along K       the same
    two-terms   two terms, one scale a token                two terms for all elements

Sums of integers do not depend on the order, the tiling or the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.launch import runs_triton
from engine.kernels.matmul.cpu_sharded import ShardedInt8Matmul, num_terms
from engine.kernels.matmul.int8 import MAX_IN_FEATURES, Int8Matmul
from engine.kernels.operands import Int8Format, SparseInt8Format
from engine.quant.cpu_formats import GROUP_SIZE, cpu_product, token_format
from engine.quant.parts import ReadPart, read_groups
from engine.quant.scheme import IntegerSums, LargestOfRow, Matmul, Tensors
from engine.quant.weight import GridWeight, Weight, to_float
from engine.quant_spec import ActivationTerms

DEVICE_FORMATS: dict[ActivationTerms, Int8Format] = {
    "default": Int8Format(2),
    "token": Int8Format(1),
    "groups": Int8Format(1, GROUP_SIZE),
    "two-terms": Int8Format(2),
}
"""What a GPU's product takes."""


@dataclass(frozen=True)
class Int8:
    """Per-channel int8 weights × int8 activations."""

    activations: ActivationTerms = "default"

    @property
    def name(self) -> str:
        return "int8" if self.activations == "default" else f"int8-{self.activations}"

    def storage(self, out_features: int, in_features: int) -> Tensors:
        if in_features > MAX_IN_FEATURES:
            raise ValueError(f"int8 sums of {in_features} products can overflow; at most {MAX_IN_FEATURES}")
        return {
            "weight": torch.empty(out_features, in_features, dtype=torch.int8, device="meta"),
            "scale": torch.empty(out_features, dtype=torch.float32, device="meta"),
        }

    def quantize(self, weight: Weight) -> Tensors:
        return _quantize(weight, lambda largest: largest)

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        shape = (out_features, in_features)
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        # Uniform codes of -127 … 127 deviate by 73.3.
        scale = torch.full((out_features,), in_features**-0.5 / 73.3, device=device)
        return {"weight": codes, "scale": scale}

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        weight, scale = tensors["weight"], tensors["scale"]
        if runs_triton(weight):
            return Int8Matmul(weight, scale, bias, DEVICE_FORMATS[self.activations])
        return cpu_product(weight, scale, bias, self.activations)

    @property
    def integer_sums(self) -> IntegerSums | None:
        # Activations in groups have sums of floats.
        return None if self.activations == "groups" else Int8Sums(token_format(self.activations))


@dataclass(frozen=True, slots=True)
class Int8Sums:
    """See `engine.quant.scheme.IntegerSums`: scales are those of whole rows and whole tokens."""

    format: SparseInt8Format

    def quantize(self, weight: Weight, largest_of_row: LargestOfRow) -> Tensors:
        return _quantize(weight, largest_of_row)

    def bind(
        self, tensors: Tensors, bias: torch.Tensor | None, outputs: slice, size: int
    ) -> ShardedInt8Matmul:
        terms = num_terms(self.format)
        return ShardedInt8Matmul(tensors["weight"], tensors["scale"], bias, outputs, size, terms)


def _quantize(weight: Weight, largest_of_row: LargestOfRow) -> Tensors:
    if isinstance(weight, GridWeight) and weight.codes.dtype == torch.int8 and weight.scale.shape[1] == 1:
        return {"weight": weight.codes, "scale": weight.scale[:, 0].float()}
    values = to_float(weight).float()
    scale = largest_of_row(values.abs().amax(dim=1)) / 127
    # A row of zeros gets the scale 1: its codes are zeros whatever they are multiplied by.
    scale = torch.where(scale > 0, scale, 1.0)
    return {"weight": (values / scale[:, None]).round().to(torch.int8), "scale": scale}


def read_int8(read: ReadPart, group_size: int) -> GridWeight:
    """A weight of our own checkpoints, in groups of so many along K with fp16 scales; 0: rows with float32 ones."""
    codes = read("codes", (torch.int8,), (None, None))
    size = group_size or codes.shape[1]
    dtype = torch.float16 if group_size else torch.float32
    return GridWeight(codes, read_groups(read, "scale", dtype, codes, size), None, size)
