"""NF4: four bits a weight, codes of the normal distribution's quantiles, a scale for each 64 along K.

    w[n, k] ≈ table[codes[n, k]] * scale[n, k // 64]      scale: the block's largest magnitude; table: NF4's values

On a CPU each block's table is rounded to the int8 grid of its row, as int4 weights are. That is an error of 0.8 % of
the weights' root mean square, beside NF4's own of 9.4 % (SmolLM2-135M); of both together it is 9.41 %.

Source: Dettmers et al. 2023, "QLoRA", section 3 (arXiv:2305.14314). Weights that bitsandbytes stored keep their codes
and scales, but are multiplied by our own kernels: sums of bitsandbytes' products depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.kernels.launch import runs_triton
from engine.kernels.matmul.codebook import SCALE_SIZE
from engine.kernels.matmul.cpu_int8 import codebook_grid
from engine.kernels.nibbles import pack_nibbles
from engine.quant.codebook import nf4_values, round_to_nf4
from engine.quant.cpu_formats import cpu_product
from engine.quant.parts import ReadPart, read_groups, read_nibbles
from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import CodebookWeight, Weight, to_float

_TABLE_TOLERANCE = 1e-6
"""How far a checkpoint's table may be off: NF4's values are written with seven digits."""


@dataclass(frozen=True)
class NF4:
    """One table for all, blocks of 64; the last one is shorter where K is no multiple of it."""

    name: str = "nf4"
    integer_sums: ClassVar[None] = None

    def storage(self, out_features: int, in_features: int) -> Tensors:
        num_blocks = -(-in_features // SCALE_SIZE)
        return {
            # Element k lies in byte k // 2, the even ones in the low nibble.
            "codes": torch.empty(out_features, (in_features + 1) // 2, dtype=torch.uint8, device="meta"),
            "scale": torch.empty(out_features, num_blocks, dtype=torch.float32, device="meta"),
        }

    def quantize(self, weight: Weight) -> Tensors:
        if not isinstance(weight, CodebookWeight) or not _is_own(weight):
            weight = round_to_nf4(to_float(weight), SCALE_SIZE)
        assert weight.scale is not None
        num_blocks = -(-weight.shape[1] // SCALE_SIZE)
        # Larger blocks are several of 64 with the same scale.
        scale = weight.scale.float().repeat_interleave(weight.group_size // SCALE_SIZE, dim=1)
        return {"codes": pack_nibbles(weight.codes), "scale": scale[:, :num_blocks].contiguous()}

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        shape = (out_features, (in_features + 1) // 2)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        scale = torch.full((out_features, -(-in_features // SCALE_SIZE)), in_features**-0.5, device=device)
        return {"codes": codes, "scale": scale / nf4_values().square().mean().sqrt().item()}

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        codes, scale = tensors["codes"], tensors["scale"]
        table = nf4_values()[None].to(codes.device)
        if runs_triton(codes):
            from engine.kernels.matmul.codebook_triton import CodebookMatmul

            return CodebookMatmul(codes, table, scale, bias)
        grid, row_scale = codebook_grid(codes, table, scale)
        return cpu_product(grid, row_scale, bias)


def _is_own(weight: CodebookWeight) -> bool:
    if weight.scale is None or weight.group_size % SCALE_SIZE or len(weight.codebook) != 1:
        return False
    table = nf4_values().to(weight.codebook.device)
    return bool((weight.codebook[0].float() - table).abs().max() <= _TABLE_TOLERANCE)


def read_nf4(read: ReadPart, group_size: int) -> CodebookWeight:
    """A weight of our own checkpoints; blocks are of 64 whatever is said."""
    codes = read_nibbles(read)
    scale = read_groups(read, "scale", torch.float32, codes, SCALE_SIZE)
    return CodebookWeight(codes, nf4_values()[None], scale, SCALE_SIZE)
