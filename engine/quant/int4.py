"""Int4: four bits a weight, a scale and a minimum for each group along K.

w[n, k] ≈ codes[n, k] * scale[n, k // group_size] + minimum[n, k // group_size]      codes in 0..15

On a GPU activations are floats. On a CPU codes are multiplied as they are stored, with an exact sum for each group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.kernels.launch import runs_triton
from engine.kernels.matmul.cpu_grouped import CpuGroupedMatmul
from engine.kernels.matmul.grouped_weight import GroupedWeight, GroupNumbers
from engine.kernels.matmul.int4 import Int4Matmul
from engine.kernels.nibbles import pack_nibbles
from engine.quant import cpu_formats
from engine.quant.parts import ReadPart, read_groups, read_nibbles
from engine.quant.scheme import Matmul, Tensors
from engine.quant.weight import GridWeight, Weight, on_grid, to_float

KERNEL_GROUP_SIZES = (128, 64, 32)
"""What the products take; larger groups are several of them with the same numbers."""


@dataclass(frozen=True)
class Int4:
    """Asymmetric groups of `group_size` along K; the last group is shorter where K is no multiple of it.

    Attributes:
        group_size: A multiple of 32; 0 is the whole row.
        batch_invariant: One form of the product for any number of tokens (`--deterministic`).
    """

    group_size: int = 32
    batch_invariant: bool = False
    integer_sums: ClassVar[None] = None

    @property
    def name(self) -> str:
        return f"int4g{self.group_size}" if self.group_size else "int4channel"

    def storage(self, out_features: int, in_features: int) -> Tensors:
        num_groups = -(-in_features // self.group_size) if self.group_size else 1
        return {
            # Element k lies in byte k // 2, the even ones in the low nibble.
            "codes": torch.empty(out_features, (in_features + 1) // 2, dtype=torch.uint8, device="meta"),
            "scale": torch.empty(out_features, num_groups, dtype=torch.float16, device="meta"),
            "minimum": torch.empty(out_features, num_groups, dtype=torch.float16, device="meta"),
        }

    def quantize(self, weight: Weight) -> Tensors:
        weight = on_grid(weight)
        if self._is_own_grid(weight):
            assert isinstance(weight, GridWeight)
            grid = weight
        else:
            grid = self._round(to_float(weight).float())
        assert grid.minimum is not None
        return {
            "codes": pack_nibbles(grid.codes),
            "scale": grid.scale.to(torch.float16),
            "minimum": grid.minimum.to(torch.float16),
        }

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        shape = (out_features, (in_features + 1) // 2)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        # Uniform codes of 0 … 15 have the mean 7.5 and deviate by 4.61.
        groups = self.storage(out_features, in_features)["scale"].shape
        scale = torch.full(groups, in_features**-0.5 / 4.61, dtype=torch.float16, device=device)
        return {"codes": codes, "scale": scale, "minimum": -7.5 * scale}

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        codes = tensors["codes"]
        size = next(size for size in KERNEL_GROUP_SIZES if self.group_size % size == 0)
        scale, minimum = (self._repeat(tensors[name], codes, size) for name in ("scale", "minimum"))
        if runs_triton(codes):
            return Int4Matmul(codes, scale, minimum, size, bias, self.batch_invariant)
        weight = GroupedWeight(
            codes=codes,
            in_features=2 * codes.shape[1],
            group_size=size,
            scale=GroupNumbers(scale),
            minimum=GroupNumbers(minimum),
            bits=4,
        )
        return CpuGroupedMatmul(weight, None, bias, cpu_formats.CPU_ACTIVATIONS)

    def _repeat(self, x: torch.Tensor, codes: torch.Tensor, size: int) -> torch.Tensor:
        """A number a group [N, groups] as one for each `size` elements."""
        if self.group_size == size:
            return x
        num_groups = -(-2 * codes.shape[1] // size)
        times = self.group_size // size if self.group_size else num_groups
        return x.repeat_interleave(times, dim=1)[:, :num_groups]

    def _is_own_grid(self, weight: Weight) -> bool:
        if not isinstance(weight, GridWeight) or weight.codes.dtype != torch.uint8:
            return False
        is_same_size = weight.group_size == (self.group_size or weight.shape[1])
        # bf16 scales, and minimums of float32, become fp16: a grid that fp16 does not hold is rounded anew.
        return is_same_size and torch.equal(weight.scale.to(torch.float16).float(), weight.scale.float())

    def _round(self, values: torch.Tensor) -> GridWeight:
        """Rounds [N, K] floats to the grid that spans each group's minimum and maximum."""
        rows, columns = values.shape
        size = self.group_size or columns
        # Padding repeats the last column, which leaves the last group's range as it is.
        padded = torch.cat((values, values[:, -1:].expand(rows, -columns % size)), dim=1)
        groups = padded.view(rows, -1, size)
        # The grid is fixed by what is stored: scale and minimum are rounded to fp16 before the codes are.
        minimum = groups.amin(dim=2).to(torch.float16)
        scale = ((groups.amax(dim=2) - minimum.float()) / 15).to(torch.float16)
        divisor = torch.where(scale > 0, scale.float(), 1.0)
        codes = ((groups - minimum.float()[:, :, None]) / divisor[:, :, None]).round_().clamp_(0, 15)
        codes = codes.to(torch.uint8).view(rows, -1)[:, :columns]
        return GridWeight(codes, scale, minimum, size)


def read_int4(read: ReadPart, group_size: int) -> GridWeight:
    """A weight of our own checkpoints, in groups of so many along K; 0 for whole rows."""
    codes = read_nibbles(read)
    size = group_size or codes.shape[1]
    scale, minimum = (read_groups(read, part, torch.float16, codes, size) for part in ("scale", "minimum"))
    return GridWeight(codes, scale, minimum, size)
