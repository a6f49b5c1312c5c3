"""Cuts: which part of a linear layer a rank holds, and what the ranks exchange around its product.

    column      W's rows are shared: each rank has some of the outputs. Those of attention's heads and of the MLP's
                inner features stay where they are, for the row-parallel layer behind them.
    row         that layer, whose inputs are shared. Either inputs are gathered and W's rows are shared again, and the
                outputs gathered too: the same bits as on one rank, for any scheme. Or W's columns are shared, and the
                products summed: the same bits if the sums are of integers, others if they are of floats.
    vocabulary  W's rows, the last rank's being fewer where they do not divide.

`row_parallel` says which; `engine.parallel.costs`, what it costs.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (arXiv:1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from engine.kernels.matmul.cpu_sharded import ShardedInt8Matmul, block_maxima, num_terms, quantize_part
from engine.kernels.matmul.int8 import MAX_IN_FEATURES
from engine.kernels.operands import Activations, Format
from engine.kernels.quantize import SPREAD_BLOCK
from engine.parallel.costs import gathered_bytes, integer_sum_bytes
from engine.parallel.exchanges import Exchange, gathered, summed
from engine.parallel.group import TensorGroup
from engine.quant.lowrank import LowRank, LowRankMatmul
from engine.quant.scheme import IntegerSums, Matmul, Scheme, Tensors
from engine.quant.weight import Weight


class Split(Protocol):
    """A rank's part of a layer that computes x Wᵀ + b."""

    def rows(self, out_features: int) -> slice:
        """Which rows of one of the matrices that W stacks are the rank's."""
        ...

    def columns(self, in_features: int) -> slice:
        """Which columns of W are the rank's."""
        ...

    def quantize(self, scheme: Scheme, weight: Weight) -> Tensors:
        """The stored tensors for the rank's part of W, or of a matrix that it stacks; all ranks call it together."""
        ...

    def bind(self, scheme: Scheme, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        """The product as its callers see it, exchanges included."""
        ...

    def exchanges(self, name: str, itemsize: int) -> list[Exchange]:
        """What a rank exchanges for each token.

        Args:
            name: What the layer is the output of, "attention" for one.
            itemsize: Bytes of an activation.
        """
        ...


@dataclass(frozen=True, slots=True)
class ColumnParallel:
    """Outputs are shared.

    Attributes:
        head_dim: Outputs come in heads of so many, of which ranks may have the same; None: they do not.
    """

    group: TensorGroup
    head_dim: int | None = None

    def rows(self, out_features: int) -> slice:
        if self.head_dim is None:
            return self.group.shard.of(out_features)
        return self.group.shard.of_heads(out_features // self.head_dim, self.head_dim)

    def columns(self, in_features: int) -> slice:
        return slice(0, in_features)

    def quantize(self, scheme: Scheme, weight: Weight) -> Tensors:
        return scheme.quantize(weight)

    def bind(self, scheme: Scheme, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        return scheme.bind(tensors, bias)

    def exchanges(self, name: str, itemsize: int) -> list[Exchange]:
        return []


@dataclass(frozen=True, slots=True)
class RowParallelGather:
    """Inputs are gathered, outputs are shared and gathered.

    Attributes:
        in_features, out_features: Of the whole layer.
    """

    group: TensorGroup
    in_features: int
    out_features: int

    def rows(self, out_features: int) -> slice:
        return self.group.shard.of(out_features)

    def columns(self, in_features: int) -> slice:
        return slice(0, in_features)

    def quantize(self, scheme: Scheme, weight: Weight) -> Tensors:
        return scheme.quantize(weight)

    def bind(self, scheme: Scheme, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        return _RowParallelGatherMatmul(self, scheme.bind(tensors, bias))

    def exchanges(self, name: str, itemsize: int) -> list[Exchange]:
        size = self.group.size
        return [
            gathered(f"inputs of the {name}'s output", self.in_features, size, itemsize),
            gathered(f"output of the {name}", self.out_features, size, itemsize),
        ]


class _RowParallelGatherMatmul(nn.Module):
    format: Format = None

    def __init__(self, split: RowParallelGather, matmul: Matmul) -> None:
        super().__init__()
        self.split, self.matmul = split, matmul

    def forward(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        group = self.split.group
        y = self.matmul(group.gather(x, self.split.in_features))
        return group.gather(y, self.split.out_features)


@dataclass(frozen=True, slots=True)
class RowParallelSum:
    """Inputs are shared, and the products, floats, are summed: the bits depend on the number of ranks.

    Attributes:
        num_sums: What is summed of a token: the outputs of the whole layer, or, of low-rank factors, those of the
            inner one.
    """

    group: TensorGroup
    num_sums: int

    def rows(self, out_features: int) -> slice:
        return slice(0, out_features)

    def columns(self, in_features: int) -> slice:
        return self.group.shard.of(in_features)

    def quantize(self, scheme: Scheme, weight: Weight) -> Tensors:
        return scheme.quantize(weight)

    def bind(self, scheme: Scheme, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        if isinstance(scheme, LowRank):
            # The outer product is then the same on all ranks.
            matmul = scheme.bind(tensors, bias)
            return LowRankMatmul(_RowParallelSumMatmul(self.group, matmul.inner), matmul.outer)
        # One rank adds the bias.
        return _RowParallelSumMatmul(
            self.group, scheme.bind(tensors, None if self.group.shard.rank else bias)
        )

    def exchanges(self, name: str, itemsize: int) -> list[Exchange]:
        return [summed(f"output of the {name}", self.num_sums, itemsize)]


class _RowParallelSumMatmul(nn.Module):
    def __init__(self, group: TensorGroup, matmul: Matmul) -> None:
        super().__init__()
        self._group, self._matmul, self.format = group, matmul, matmul.format

    def forward(self, x: Activations) -> torch.Tensor:
        return self._group.sum_(self._matmul(x))


@dataclass(frozen=True, slots=True)
class RowParallelIntegerSum:
    """Inputs are shared, and products of int8 activations × int8 weights are summed as integers: the bits of one
    rank, as W's scales are those of whole rows, and the activations' those of whole tokens.

    Attributes:
        in_features, out_features: Of the whole layer.
        sums: What its scheme offers.
    """

    group: TensorGroup
    in_features: int
    out_features: int
    sums: IntegerSums

    @staticmethod
    def of(
        group: TensorGroup, in_features: int, out_features: int, scheme: Scheme
    ) -> RowParallelIntegerSum | None:
        """The split of a layer into integer sums; None if the scheme or the kernels do not allow it."""
        sums = scheme.integer_sums
        if not group.has_integer_sums or sums is None:
            return None
        # A rank's part of a grid of blocks of 32 is told from one of whole rows by having two blocks or more.
        blocks = in_features // SPREAD_BLOCK // group.size
        if blocks * SPREAD_BLOCK * group.size != in_features or blocks < 2 or out_features % group.size:
            return None
        if in_features > MAX_IN_FEATURES:
            return None
        return RowParallelIntegerSum(group, in_features, out_features, sums)

    def rows(self, out_features: int) -> slice:
        return slice(0, out_features)

    def columns(self, in_features: int) -> slice:
        return self.group.shard.of(in_features)

    def quantize(self, scheme: Scheme, weight: Weight) -> Tensors:
        return self.sums.quantize(weight, self.group.largest)

    def bind(self, scheme: Scheme, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        outputs = self.group.shard.of(self.out_features)
        return _RowParallelIntegerSumMatmul(self, self.sums.bind(tensors, bias, outputs, self.group.size))

    def exchanges(self, name: str, itemsize: int) -> list[Exchange]:
        size, num_sums = self.group.size, num_terms(self.sums.format) * self.out_features
        blocks = self.in_features // SPREAD_BLOCK
        return [
            gathered(f"largest inputs of the {name}'s output", blocks, size, itemsize),
            summed(f"integers of the {name}'s output", num_sums, torch.int32.itemsize),
            gathered(f"output of the {name}", self.out_features, size, itemsize),
        ]


class _RowParallelIntegerSumMatmul(nn.Module):
    format: Format = None

    def __init__(self, split: RowParallelIntegerSum, product: ShardedInt8Matmul) -> None:
        super().__init__()
        self.split, self.product = split, product

    def forward(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        split, group = self.split, self.split.group
        maxima = group.gather(block_maxima(x), split.in_features // SPREAD_BLOCK)
        codes = quantize_part(x, maxima, split.sums.format)
        sums = group.scatter(self.product.sums(codes))
        return group.gather(self.product.finish(sums, codes), split.out_features)


def row_parallel(group: TensorGroup, in_features: int, out_features: int, scheme: Scheme) -> Split:
    """The split of a layer behind a column-parallel one.

    Of the two forms with the bits of one rank, the one which sends fewer bytes: sums of integers where the scheme has
    them and the layer narrows (K > 2.06 N with two terms), else gathering.

    Args:
        in_features, out_features: K and N of the whole layer.
    """
    if group.size == 1 or not group.rank_invariant:
        return RowParallelSum(group, scheme.rank if isinstance(scheme, LowRank) else out_features)
    sums = RowParallelIntegerSum.of(group, in_features, out_features, scheme)
    if sums is not None:
        terms = num_terms(sums.sums.format)
        shape = (in_features, out_features, group.size)
        if integer_sum_bytes(*shape, terms) < gathered_bytes(*shape):
            return sums
    return RowParallelGather(group, in_features, out_features)
