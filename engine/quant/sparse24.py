"""Sparse24: weights with at most two of each four along K that are not zero, of which only these are stored.

    w[n, k] = v[n, k] * scale[n]                        sparse24:int8    v as of `Int8`, five bits a weight
    w[n, k] = v[n, k] * scale[n, k // group_size]       sparse24:int4    v of -8 … 7, an fp16 scale: 3.5 bits in 32s

Two codes of each four are kept, and a mask of four bits says of which (`engine.kernels.matmul.sparse24`). Rounding,
activations and the order of sums are those of `Int8` and `Int4` with the same weight stored dense, the latter with
minimums of -8 * scale: so the products are theirs to the bit. They are multiplied as they are stored.

Such weights are made by pruning: `python -m engine.quant --steps "prune=2of4 + ..."`.

Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (arXiv:2104.08378), of the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.errors import ConfigError
from engine.kernels.launch import runs_triton
from engine.kernels.matmul.cpu_grouped import CpuGroupedMatmul
from engine.kernels.matmul.cpu_sharded import ShardedInt8Matmul, num_terms
from engine.kernels.matmul.grouped_weight import GroupedWeight, GroupNumbers
from engine.kernels.matmul.int4 import Int4Matmul
from engine.kernels.matmul.int8 import Int8Matmul
from engine.kernels.matmul.sparse24 import CENTRE, FOUR, SparseCodes, compress, first_dense_four
from engine.kernels.operands import SparseInt8Format
from engine.quant.cpu_formats import CPU_ACTIVATIONS, cpu_product
from engine.quant.int8 import DEVICE_FORMATS, Int8, Int8Sums
from engine.quant.parts import ReadPart, read_groups
from engine.quant.rounding import round_to_nearest
from engine.quant.scheme import IntegerSums, LargestOfRow, Matmul, Tensors
from engine.quant.weight import GridWeight, Weight, on_grid, to_float


@dataclass(frozen=True)
class Sparse24Int8:
    """Two int8 codes of each four, one scale a row, int8 activations."""

    name: str = "sparse24-int8"

    def storage(self, out_features: int, in_features: int) -> Tensors:
        return _codes_storage(out_features, in_features, 8) | {
            "scale": torch.empty(out_features, dtype=torch.float32, device="meta")
        }

    def quantize(self, weight: Weight) -> Tensors:
        """
        Raises:
            ConfigError: A four of the weight has more than two elements that are not zero.
        """
        return _compress_int8(Int8().quantize(weight))

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        tensors = _random_codes(self.storage(out_features, in_features), device)
        # Half of the elements deviate by 73.3.
        step = (in_features / 2) ** -0.5 / 73.3
        return tensors | {"scale": torch.full((out_features,), step, device=device)}

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        weight, scale = _codes(tensors), tensors["scale"]
        if runs_triton(scale):
            return Int8Matmul(weight, scale, bias, DEVICE_FORMATS["default"])
        return cpu_product(weight, scale, bias)

    @property
    def integer_sums(self) -> IntegerSums:
        return SparseInt8Sums(CPU_ACTIVATIONS)


@dataclass(frozen=True, slots=True)
class SparseInt8Sums:
    """See `engine.quant.scheme.IntegerSums`: as those of `Int8`, over parts whose columns begin between two fours."""

    format: SparseInt8Format

    def quantize(self, weight: Weight, largest_of_row: LargestOfRow) -> Tensors:
        return _compress_int8(Int8Sums(self.format).quantize(weight, largest_of_row))

    def bind(
        self, tensors: Tensors, bias: torch.Tensor | None, outputs: slice, size: int
    ) -> ShardedInt8Matmul:
        terms = num_terms(self.format)
        return ShardedInt8Matmul(_codes(tensors), tensors["scale"], bias, outputs, size, terms)


@dataclass(frozen=True)
class Sparse24Int4:
    """Two codes of four bits of each four, around zero, a scale for each `group_size` along K.

    Attributes:
        group_size: 32, 64 or 128; the last group is shorter where K is no multiple of it.
        batch_invariant: As of `Int4`.
    """

    group_size: int = 32
    batch_invariant: bool = False
    integer_sums: ClassVar[None] = None

    @property
    def name(self) -> str:
        return f"sparse24-int4g{self.group_size}"

    def storage(self, out_features: int, in_features: int) -> Tensors:
        shape = (out_features, -(-in_features // self.group_size))
        return _codes_storage(out_features, in_features, 4) | {
            "scale": torch.empty(shape, dtype=torch.float16, device="meta")
        }

    def quantize(self, weight: Weight) -> Tensors:
        """
        Raises:
            ConfigError: As `Sparse24Int8.quantize`.
        """
        grid = on_grid(weight)
        if not isinstance(grid, GridWeight) or not self._is_own_grid(grid):
            grid = round_to_nearest(to_float(weight).float(), 4, self.group_size, symmetric=True)
        codes = compress_checked((grid.codes - CENTRE).view(torch.int8), 4)
        return {"kept": codes.kept, "masks": codes.masks, "scale": grid.scale.to(torch.float16)}

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        storage = self.storage(out_features, in_features)
        # Half of the elements deviate by 4.61.
        step = (in_features / 2) ** -0.5 / 4.61
        scale = torch.full(storage["scale"].shape, step, dtype=torch.float16, device=device)
        return _random_codes(storage, device) | {"scale": scale}

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        weight, scale = _codes(tensors), tensors["scale"]
        if runs_triton(scale):
            return Int4Matmul(weight, scale, None, self.group_size, bias, self.batch_invariant)
        grouped = GroupedWeight(
            codes=weight.kept,
            masks=weight.masks,
            in_features=weight.shape[1],
            group_size=self.group_size,
            scale=GroupNumbers(scale),
            # Exact in fp16.
            minimum=GroupNumbers(-CENTRE * scale),
            bits=4,
        )
        return CpuGroupedMatmul(grouped, None, bias, CPU_ACTIVATIONS)

    def _is_own_grid(self, grid: GridWeight) -> bool:
        """Whether its codes stand for multiples of scales that fp16 holds, in the same groups."""
        scale = grid.scale.float()
        return (
            grid.codes.dtype == torch.uint8
            and grid.group_size == self.group_size
            and grid.minimum is not None
            and torch.equal(grid.minimum.float(), -CENTRE * scale)
            and torch.equal(scale.to(torch.float16).float(), scale)
        )


def _codes_storage(out_features: int, in_features: int, bits: int) -> Tensors:
    if in_features % FOUR:
        raise ConfigError(
            f"quant: sparse24 needs rows of whole fours, and there are some of {in_features}: take int{bits}"
        )
    kept = (in_features // 2, torch.int8) if bits == 8 else (in_features // FOUR, torch.uint8)
    return {
        "kept": torch.empty(out_features, kept[0], dtype=kept[1], device="meta"),
        "masks": torch.empty(out_features, -(-in_features // (2 * FOUR)), dtype=torch.uint8, device="meta"),
    }


def _random_codes(storage: Tensors, device: torch.device) -> Tensors:
    kept, masks = (torch.empty_like(storage[name], device=device) for name in ("kept", "masks"))
    if kept.dtype == torch.int8:
        kept.random_(-127, 128)
    else:
        kept.random_(0, 256)
    # The masks of two bits: 0011, 0101, 0110, 1001, 1010, 1100.
    two_bits = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8, device=device)
    low, high = (two_bits[torch.randint(6, masks.shape, device=device)] for _ in range(2))
    return {"kept": kept, "masks": low | high << 4}


def _codes(tensors: Tensors) -> SparseCodes:
    return SparseCodes(tensors["kept"], tensors["masks"])


def _compress_int8(dense: Tensors) -> Tensors:
    codes = compress_checked(dense["weight"], 8)
    return {"kept": codes.kept, "masks": codes.masks, "scale": dense["scale"]}


def compress_checked(integers: torch.Tensor, bits: int) -> SparseCodes:
    """`compress`.

    Raises:
        ConfigError: A four has more than two elements that are not zero.
    """
    place = first_dense_four(integers)
    if place is not None:
        row, column = place
        raise ConfigError(
            f"row {row} has more than two numbers besides zeros in columns {column} to {column + FOUR - 1}, and "
            'sparse24 keeps two of four: prune the model first (python -m engine.quant MODEL --steps "prune=2of4 + '
            f'sparse24:int{bits}" --out DIR), or take int{bits}'
        )
    return compress(integers, bits)


def sparse_parts(weight: GridWeight) -> dict[str, torch.Tensor]:
    """A weight's parts as they are stored: int8 rows, or codes of four bits around zero.

    Raises:
        ConfigError: As `compress_checked`.
    """
    if weight.codes.dtype == torch.int8:
        codes = compress_checked(weight.codes, 8)
    else:
        codes = compress_checked((weight.codes - CENTRE).view(torch.int8), 4)
    return {"codes": codes.kept, "masks": codes.masks, "scale": weight.scale}


def read_sparse24_int8(read: ReadPart, group_size: int) -> GridWeight:
    """A weight of our own checkpoints, its zeros among the codes."""
    kept = read("codes", (torch.int8,), (None, None))
    integers = _read_masks(read, kept, 2 * kept.shape[1]).expand()
    scale = read_groups(read, "scale", torch.float32, integers, integers.shape[1])
    return GridWeight(integers, scale, None, integers.shape[1])


def read_sparse24_int4(read: ReadPart, group_size: int) -> GridWeight:
    """The same of four bits, in groups of so many along K."""
    kept = read("codes", (torch.uint8,), (None, None))
    integers = _read_masks(read, kept, FOUR * kept.shape[1]).expand()
    scale = read_groups(read, "scale", torch.float16, integers, group_size)
    return GridWeight((integers + CENTRE).view(torch.uint8), scale, -CENTRE * scale, group_size)


def _read_masks(read: ReadPart, kept: torch.Tensor, in_features: int) -> SparseCodes:
    return SparseCodes(kept, read("masks", (torch.uint8,), (len(kept), -(-in_features // (2 * FOUR)))))
