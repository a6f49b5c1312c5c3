"""Cuts: which part of a linear layer a rank holds, and what the ranks exchange around its product.

    column      W's rows are shared: each rank has some of the outputs. Those of attention's heads and of the MLP's
                inner features stay where they are, for the row-parallel layer behind them.
    row         that layer, whose inputs are shared. Either inputs are gathered and W's rows are shared again, and the
                outputs gathered too: the same bits as on one rank, for any scheme. Or W's columns are shared, and the
                products summed: fewer bytes for what is narrow, and other bits unless the sums are of integers.
    vocabulary  W's rows, the last rank's being fewer where they do not divide.

Source: Shoeybi et al. 2019, "Megatron-LM", section 3 (arXiv:1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.kernels.activations import Activations, Format
from engine.parallel.group import TensorGroup
from engine.quant.scheme import Matmul, Scheme, Tensors


class Cut(Protocol):
    """A rank's part of a layer that computes x Wᵀ + b."""

    def rows(self, out_features: int) -> slice:
        """Of one of the matrices that W stacks."""
        ...

    def columns(self, in_features: int) -> slice:
        """Of W."""
        ...

    def bind(self, scheme: Scheme, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        """The product as its callers see it, exchanges included."""
        ...


@dataclass(frozen=True, slots=True)
class ColumnCut:
    """Outputs are shared.

    Attributes:
        head_dim: Outputs come in heads of so many, of which ranks may have the same; None: they do not.
    """

    group: TensorGroup
    head_dim: int | None = None

    def rows(self, out_features: int) -> slice:
        if self.head_dim is None:
            return self.group.share.of(out_features)
        return self.group.share.of_heads(out_features // self.head_dim, self.head_dim)

    def columns(self, in_features: int) -> slice:
        return slice(0, in_features)

    def bind(self, scheme: Scheme, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        return scheme.bind(tensors, bias)


@dataclass(frozen=True, slots=True)
class GatheredCut:
    """Inputs are gathered, outputs are shared and gathered.

    Attributes:
        in_features, out_features: Of the whole layer.
    """

    group: TensorGroup
    in_features: int
    out_features: int

    def rows(self, out_features: int) -> slice:
        return self.group.share.of(out_features)

    def columns(self, in_features: int) -> slice:
        return slice(0, in_features)

    def bind(self, scheme: Scheme, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        return _GatheredMatmul(self, scheme.bind(tensors, bias))


@dataclass(slots=True)
class _GatheredMatmul:
    cut: GatheredCut
    matmul: Matmul
    format: Format = None

    def __call__(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)
        group = self.cut.group
        y = self.matmul(group.gather(x, self.cut.in_features))
        return group.gather(y, self.cut.out_features)


@dataclass(frozen=True, slots=True)
class SummedCut:
    """Inputs are shared, and the products, floats, are summed: the bits depend on the number of ranks."""

    group: TensorGroup

    def rows(self, out_features: int) -> slice:
        return slice(0, out_features)

    def columns(self, in_features: int) -> slice:
        return self.group.share.of(in_features)

    def bind(self, scheme: Scheme, tensors: Tensors, bias: torch.Tensor | None) -> Matmul:
        # One rank adds the bias.
        return _SummedMatmul(self.group, scheme.bind(tensors, None if self.group.share.rank else bias))


class _SummedMatmul:
    def __init__(self, group: TensorGroup, matmul: Matmul) -> None:
        self._group, self._matmul, self.format = group, matmul, matmul.format

    def __call__(self, x: Activations) -> torch.Tensor:
        return self._group.sum_(self._matmul(x))


def row_cut(group: TensorGroup, in_features: int, out_features: int) -> Cut:
    """That of a layer behind a column-parallel one."""
    if group.size == 1 or not group.is_exact:
        return SummedCut(group)
    return GatheredCut(group, in_features, out_features)
