"""Codebook4: four bits a weight, and for each row the sixteen values that suit it.

    w[n, k] ≈ codebook[n, codes[n, k]]

The values are found by k-means (`engine.quant.codebook.cluster_rows`) where the weight does not come with some. On a
CPU they are rounded to the int8 grid of their row: that is an error of 0.8 % of the weights' root mean square, beside
8.8 % of the clusters themselves (SmolLM2-135M); of both together it is 8.84 %.

Source: Kim et al. 2023, "SqueezeLLM", section 4.1 (arXiv:2306.07629).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.kernels.launch import runs_triton
from engine.kernels.matmul.cpu_int8 import codebook_grid
from engine.kernels.nibbles import pack_nibbles
from engine.quant.codebook import SIZE, cluster_rows
from engine.quant.cpu_formats import cpu_product
from engine.quant.parts import ReadPart, read_nibbles
from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import CodebookWeight, Weight, to_float


@dataclass(frozen=True)
class Codebook4:
    """A codebook of fp16 values a row."""

    name: str = "codebook4"
    integer_sums: ClassVar[None] = None

    def storage(self, out_features: int, in_features: int) -> Tensors:
        return {
            # Element k lies in byte k // 2, the even ones in the low nibble.
            "codes": torch.empty(out_features, (in_features + 1) // 2, dtype=torch.uint8, device="meta"),
            "codebook": torch.empty(out_features, SIZE, dtype=torch.float16, device="meta"),
        }

    def quantize(self, weight: Weight) -> Tensors:
        if not isinstance(weight, CodebookWeight) or not _is_own(weight):
            weight = cluster_rows(to_float(weight))
        return {"codes": pack_nibbles(weight.codes), "codebook": weight.codebook.to(torch.float16)}

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        shape = (out_features, (in_features + 1) // 2)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        values = torch.linspace(-1, 1, SIZE, device=device)
        values *= in_features**-0.5 / values.square().mean().sqrt()
        return {"codes": codes, "codebook": values.to(torch.float16).repeat(out_features, 1)}

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        codes, codebook = tensors["codes"], tensors["codebook"]
        if runs_triton(codes):
            from engine.kernels.matmul.codebook_triton import CodebookMatmul

            return CodebookMatmul(codes, codebook, None, bias)
        grid, row_scale = codebook_grid(codes, codebook, None)
        return cpu_product(grid, row_scale, bias)


def _is_own(weight: CodebookWeight) -> bool:
    if weight.scale is not None or len(weight.codebook) != weight.shape[0]:
        return False
    # Values that fp16 does not hold are fitted anew.
    return torch.equal(weight.codebook.to(torch.float16).float(), weight.codebook.float())


def read_codebook4(read: ReadPart, group_size: int) -> CodebookWeight:
    """A weight of our own checkpoints; it has no groups along K."""
    codes = read_nibbles(read)
    codebook = read("codebook", (torch.float16,), (codes.shape[0], SIZE))
    return CodebookWeight(codes, codebook, None, codes.shape[1])
