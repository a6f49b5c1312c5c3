"""What a product takes as its left operand: floats, or what an earlier kernel has made of them on its way out.

A scheme names the format that its product wants. A norm or an activation that runs as a Triton or C kernel writes
that format instead of floats, which saves a pass over memory; torch's operators pass floats on, and every product
takes floats too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from engine.kernels.cpu.signatures import Argument

GroupSize = Literal[32, 64, 128]

SUM_SIZE = 32
"""Elements along K in one of `GroupSums`' sums, the smallest group of an int4 weight."""


@dataclass(frozen=True, slots=True)
class Int8Format:
    """int8 terms of each token.

    Attributes:
        terms: 1: the rounded value; 2: also the remainder, on a grid 254 times finer.
        group_size: Elements along K that share a scale: 32, 64 or 128; None for one scale a token.
    """

    terms: Literal[1, 2] = 2
    group_size: GroupSize | None = None


@dataclass(frozen=True, slots=True)
class SumsFormat:
    """Floats and the sums of each 32 of them.

    Attributes:
        is_rotated: Whether the floats are rotated before (`engine.kernels.rotation`), and rounded again.
    """

    is_rotated: bool = False


@dataclass(frozen=True, slots=True)
class SparseInt8Format:
    """int8 codes of each token, and a second term for the few elements that they cannot hold.

    Attributes:
        spread: The scale is so many times what would just hold the median of the largest elements of each 32.
            Infinity: it just holds the largest element, and there is no second term.
        is_rotated: Whether tokens are rotated before (`engine.kernels.rotation`).
    """

    spread: float
    is_rotated: bool = False


Format = Int8Format | SumsFormat | SparseInt8Format | None
"""None: floats alone."""


@dataclass(frozen=True, slots=True)
class Int8Activations:
    """x[m, k] ≈ (high[m, k] + low[m, k] / 254) * scale[m, group of k].

    Attributes:
        high: [M, K] int8.
        low: [M, K] int8, or None with one term.
        scale: [M, groups] float32; one group without a group size.
        dtype: The floats' type, which a product returns.
    """

    high: torch.Tensor
    low: torch.Tensor | None
    scale: torch.Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class SparseInt8Activations:
    """x[m, k] = (128 * high[m, k] + low[m, k]) * scale[m], as the C bodies keep it (kernels/cpu/kernels.h).

    Attributes:
        low: [M, K padded to 64] int8.
        tokens: [M, 4] int32: the bits of a float32 scale, the sums of low and high terms, the number of quads.
        quads: [M, K / 4, 2] int32: the place of four elements along K, and their high terms as four bytes, for
            each four that have one.
    """

    low: torch.Tensor
    tokens: torch.Tensor
    quads: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.low.shape[0]

    def arguments(self) -> dict[str, Argument]:
        """The four arguments that C bodies take."""
        return {
            "low": self.low,
            "tokens": self.tokens,
            "quads": self.quads,
            "stride": self.low.shape[1],
        }


@dataclass(frozen=True, slots=True)
class GroupSums:
    """Floats, and their sums over SUM_SIZE consecutive elements along K.

    Attributes:
        values: [M, K] float.
        sums: [M, ceil(K / 32)] float32.
    """

    values: torch.Tensor
    sums: torch.Tensor


Activations = torch.Tensor | Int8Activations | SparseInt8Activations | GroupSums


def num_tokens(x: Activations) -> int:
    """M of the activations [M, K]."""
    match x:
        case Int8Activations():
            return x.high.shape[0]
        case SparseInt8Activations():
            return x.num_tokens
        case GroupSums():
            return x.values.shape[0]
    return x.shape[0]
