"""LowRank: a weight that is the product of two factors, which are multiplied one after the other.

    w = outer @ inner          outer [N, R], inner [R, K]
    y = outer (inner x) + b

Each factor is stored, and multiplied, as another scheme says (`lowrank:int8` as `Int8`): what the inner product gives
is rounded to the model's activations, and quantized for the outer one as any activations are. So bits depend on
neither batch nor device where those of the factors' scheme do not. Matrices that are multiplied as one, like queries,
keys and values, share the inner factor.

Such weights are made by `python -m engine.quant --steps "lowrank=budget0.8,svd-llm + lowrank:int8"`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from engine.errors import ConfigError
from engine.kernels.operands import Activations, Format
from engine.quant.parts import ReadPart
from engine.quant.scheme import Matmul, Scheme, Tensors
from engine.quant.weight import CodebookWeight, GridWeight, LowRankWeight, Weight

OUTER, INNER = "outer_", "inner_"
"""How the names of the factors' tensors begin; those of an inner one do not have a weight's rows."""

Factor = torch.Tensor | GridWeight | CodebookWeight

ReadFactor = Callable[[ReadPart, int], Factor]
"""Reads a factor as a weight is read, in groups of so many along K."""


class LowRankMatmul(nn.Module):
    """The product with the inner factor, and of what it gives with the outer one.

    Attributes:
        inner: [M, K] → [M, R].
        outer: [M, R] → [M, N], bias included.
    """

    def __init__(self, inner: Matmul, outer: Matmul) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer
        self.format: Format = inner.format

    def forward(self, x: Activations) -> torch.Tensor:
        """[M, K] → [M, N]."""
        return self.outer(self.inner(x))


@dataclass(frozen=True)
class LowRank:
    """Two factors.

    Attributes:
        factors: How each is stored and multiplied.
        rank: R.

    Raises:
        ConfigError: The rank was not said.
    """

    factors: Scheme
    rank: int
    integer_sums: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(
                "quant: lowrank has no rank: a checkpoint of factors says its own (leave --quant out); for random "
                "weights say one behind it, r64"
            )

    @property
    def name(self) -> str:
        return f"lowrank{self.rank}-{self.factors.name}"

    def storage(self, out_features: int, in_features: int) -> Tensors:
        return _named(
            self.factors.storage(out_features, self.rank), self.factors.storage(self.rank, in_features)
        )

    def quantize(self, weight: Weight) -> Tensors:
        """
        Raises:
            ConfigError: The weight is no product of factors of this rank.
        """
        if not isinstance(weight, LowRankWeight) or weight.rank != self.rank:
            raise ConfigError(
                f"the weight is no product of factors of rank {self.rank}: make one first (python -m engine.quant "
                'MODEL --steps "lowrank=budget0.8,svd-llm + lowrank:int8" --out DIR), or take int8'
            )
        return _named(self.factors.quantize(weight.outer), self.factors.quantize(weight.inner))

    def random(self, out_features: int, in_features: int, device: torch.device) -> Tensors:
        return _named(
            self.factors.random(out_features, self.rank, device),
            self.factors.random(self.rank, in_features, device),
        )

    def bind(self, tensors: Tensors, bias: torch.Tensor | None) -> LowRankMatmul:
        outer, inner = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in (OUTER, INNER)
        )
        return LowRankMatmul(self.factors.bind(inner, None), self.factors.bind(outer, bias))


def _named(outer: Tensors, inner: Tensors) -> Tensors:
    return {
        prefix + name: tensor
        for prefix, tensors in ((OUTER, outer), (INNER, inner))
        for name, tensor in tensors.items()
    }


def read_low_rank(read: ReadPart, group_size: int, read_factor: ReadFactor) -> LowRankWeight:
    """A weight of our own checkpoints.

    Args:
        read_factor: What reads either factor.
    """

    def read_outer(part: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> torch.Tensor:
        return read(OUTER + part, dtypes, shape)

    def read_inner(part: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> torch.Tensor:
        return read(INNER + part, dtypes, (rank, *shape[1:]))

    outer = read_factor(read_outer, group_size)
    rank = outer.shape[1]
    return LowRankWeight(outer, read_factor(read_inner, group_size))


def read_floats(read: ReadPart, group_size: int) -> torch.Tensor:
    """A factor of floats."""
    return read("weight", (torch.float16, torch.bfloat16, torch.float32), (None, None))
