"""A weight as checkpoints hold it: floats, or codes that need not be rounded again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.kernels.nibbles import unpack_nibbles
from engine.kernels.rotation import rotate
from engine.quant.block_weight import BLOCK_TYPES, BlockWeight

MOST_ZERO = 112
"""Steps to the minimum of a grid of four bits whose codes eight bits hold without it."""

_EXPONENTS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
"""The bits of which all are set in a number that is infinite or none."""


@dataclass(frozen=True, slots=True)
class GridWeight:
    """A matrix quantized in groups along K: ``w[n, k] = codes[n, k] * scale[n, g] + minimum[n, g]``.

    Attributes:
        codes: [N, K] uint8 (0..15, four bits) or int8 (eight bits, symmetric).
        scale: [N, ceil(K / group_size)], fp16 or wider.
        minimum: Like `scale`, or None where the grid is symmetric (taken as zero).
        group_size: Consecutive elements along K that share a scale; the last group may be shorter.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None
    group_size: int

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> torch.Tensor:
        """The weight as floats, [N, K] float32."""
        columns = self.codes.shape[1]
        scale = self.scale.float().repeat_interleave(self.group_size, dim=1)[:, :columns]
        values = self.codes.float() * scale
        if self.minimum is not None:
            values += self.minimum.float().repeat_interleave(self.group_size, dim=1)[:, :columns]
        return values

    def rows(self, index: torch.Tensor) -> GridWeight:
        """The same grid with its rows taken in the order of `index` ([N] int64)."""
        minimum = None if self.minimum is None else self.minimum.index_select(0, index)
        codes, scale = self.codes.index_select(0, index), self.scale.index_select(0, index)
        return GridWeight(codes, scale, minimum, self.group_size)


@dataclass(frozen=True, slots=True)
class CodebookWeight:
    """A matrix of values from books of sixteen: ``w[n, k] = codebook[n or 0, codes[n, k]] * scale[n, g]``.

    Attributes:
        codes: [N, K] uint8, 0..15.
        codebook: [N, 16] or, one for all rows, [1, 16], float of any width.
        scale: [N, ceil(K / group_size)] float32, or None where the codebook holds the values themselves.
        group_size: Consecutive elements along K that share a scale; the last group may be shorter. K without one.
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor | None
    group_size: int

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> torch.Tensor:
        """The weight as floats, [N, K] float32."""
        rows, columns = self.codes.shape
        values = self.codebook.float().expand(rows, -1).gather(1, self.codes.long())
        if self.scale is not None:
            values *= self.scale.float().repeat_interleave(self.group_size, dim=1)[:, :columns]
        return values

    def rows(self, index: torch.Tensor) -> CodebookWeight:
        """The same weight with its rows taken in the order of `index` ([N] int64)."""
        codebook = self.codebook if len(self.codebook) == 1 else self.codebook.index_select(0, index)
        scale = None if self.scale is None else self.scale.index_select(0, index)
        return CodebookWeight(self.codes.index_select(0, index), codebook, scale, self.group_size)


@dataclass(frozen=True, slots=True)
class LowRankWeight:
    """A matrix that is the product of two: ``w = outer @ inner``.

    Attributes:
        outer: [N, R].
        inner: [R, K]; matrices that are multiplied as one have the same.
    """

    outer: torch.Tensor | GridWeight | CodebookWeight
    inner: torch.Tensor | GridWeight | CodebookWeight

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.outer.shape[0], self.inner.shape[1]))

    @property
    def rank(self) -> int:
        return self.inner.shape[0]

    def dequantize(self) -> torch.Tensor:
        """The weight as floats, [N, K] float32."""
        return to_float(self.outer).float() @ to_float(self.inner).float()

    def rows(self, index: torch.Tensor) -> LowRankWeight:
        """The same weight with its rows taken in the order of `index` ([N] int64)."""
        outer = self.outer
        taken = outer.index_select(0, index) if isinstance(outer, torch.Tensor) else outer.rows(index)
        return LowRankWeight(taken, self.inner)


@dataclass(frozen=True, slots=True)
class RotatedWeight:
    """A matrix W that is stored as W H, in blocks along K (`engine.kernels.rotation`).

    Attributes:
        grid: W H.
    """

    grid: GridWeight

    @property
    def shape(self) -> torch.Size:
        return self.grid.shape

    def dequantize(self) -> torch.Tensor:
        """W as floats, [N, K] float32."""
        return rotate(self.grid.dequantize())

    def rows(self, index: torch.Tensor) -> RotatedWeight:
        """The same weight with its rows taken in the order of `index` ([N] int64)."""
        return RotatedWeight(self.grid.rows(index))


Weight = torch.Tensor | GridWeight | CodebookWeight | BlockWeight | LowRankWeight | RotatedWeight


def to_float(weight: Weight) -> torch.Tensor:
    """The weight as a float tensor; a float weight is returned as it is."""
    return weight if isinstance(weight, torch.Tensor) else weight.dequantize()


def take_rows(weight: Weight, index: torch.Tensor) -> Weight:
    """Rows in the order of `index` ([N] int64)."""
    return weight.index_select(0, index) if isinstance(weight, torch.Tensor) else weight.rows(index)


def stack_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors [N_i, …] one below the other; a single one is not copied.

    On the CPU by this thread alone: torch's threads would wait for each other, for long where the machine is busy.
    """
    if len(parts) == 1:
        return parts[0]
    if not parts[0].is_cpu:
        return torch.cat(list(parts))
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    stacked = torch.empty(shape, dtype=parts[0].dtype)
    target, position = _bytes_of(stacked), 0
    for part in parts:
        source = _bytes_of(part.contiguous())
        target[position : position + len(source)] = source
        position += len(source)
    return stacked


def _bytes_of(x: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return x.view(-1).view(torch.uint8).numpy()


def is_finite(x: torch.Tensor) -> bool:
    """Whether no number of a tensor on the CPU is infinite or none (NaN); by this thread alone, as `stack_rows`."""
    if x.dtype in _EXPONENTS:
        bits, exponent = x.contiguous().view(torch.int16).numpy(), _EXPONENTS[x.dtype]
        return not bool(((bits & exponent) == exponent).any())
    return bool(np.isfinite(x.float().numpy()).all())


def on_grid(weight: Weight) -> Weight:
    """The same numbers as a `GridWeight`, where a GGUF type is such: where groups have fp16 numbers of their own."""
    if not isinstance(weight, BlockWeight) or BLOCK_TYPES[weight.kind].block_size:
        return weight
    grouped, scale = weight.grouped, weight.parts["scale"]
    if grouped.values is not None or grouped.bits != 4:
        if grouped.minimum is not None:
            return weight  # five bits
        return GridWeight(grouped.integers().to(torch.int8), scale, None, grouped.group_size)
    # A multiple by a power of two is exact; in float32 it does not overflow either.
    minimum = weight.parts["minimum"] if grouped.minimum is not None else -grouped.offset * scale.float()
    codes = unpack_nibbles(grouped.codes)[:, : weight.in_features]
    return GridWeight(codes, scale, minimum, grouped.group_size)


def signed_grid(weight: Weight) -> Weight:
    """A grid of four bits whose minimum is a whole number of steps, as Q4_0's are: the same numbers without one."""
    weight = on_grid(weight)
    if not isinstance(weight, GridWeight) or weight.codes.dtype != torch.uint8 or weight.minimum is None:
        return weight
    scale, minimum = weight.scale.float(), weight.minimum.float()
    zero = (-minimum / scale.where(scale != 0, 1)).round()
    if not torch.equal(-zero * scale, minimum) or bool((zero.abs() > MOST_ZERO).any()):
        return weight
    columns = weight.codes.shape[1]
    zeros = zero.to(torch.int8).repeat_interleave(weight.group_size, dim=1)[:, :columns]
    return GridWeight(weight.codes.view(torch.int8) - zeros, weight.scale, None, weight.group_size)
