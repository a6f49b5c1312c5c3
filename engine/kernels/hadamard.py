"""Query and key heads as an int8 cache has them: multiplied by a Hadamard matrix, which spreads a few large elements.

A key's elements share one step, which its largest element sets. In many models a few dimensions are ten times the
others, which leaves these a tenth of the steps. An orthogonal matrix on both sides leaves each product as it is, and
one of ±1 spreads every element over all (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4). KL divergence
that int8 keys cost SmolLM2-135M, and Gemma-3-270M, in nat: 0.00075 and 0.0053; of spread ones 0.00016 and 0.0009
(every eighth of 1,024 tokens of Python's help topics, simulated beside float weights, 2026-11-30). Values cost a
tenth of that as they are, and four bits in groups gain nothing reliable.
"""

from __future__ import annotations

import torch


def hadamard_levels(head_dim: int) -> int:
    """L, where spread_heads multiplies by matrices [2^(L + 1), 2^(L + 1)]: 2^L divides half a head."""
    half = head_dim // 2
    return (half & -half).bit_length() - 1


def hadamard_factors(head_dim: int) -> tuple[float, float]:
    """What spread queries and keys are multiplied by, so that their products are the heads': powers of two."""
    levels = hadamard_levels(head_dim) + 1
    return 0.5 ** (levels // 2), 0.5 ** (levels - levels // 2)


def spread_heads(heads: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiplies heads by Sylvester's Hadamard matrix, and by a factor.

    Where half of head_dim is no power of two, pieces of 2^L elements and those half a head behind them have a matrix
    of their own. Sums and differences of two are rounded one by one, neighbours first, halves last: bodies agree to
    the bit.

    Args:
        heads: [..., head_dim] float32; head_dim is even.
    """
    head_dim = heads.shape[-1]
    pieces = multiply_by_sylvester(heads.unflatten(-1, (-1, 1 << hadamard_levels(head_dim))))
    first, second = pieces.flatten(-2).chunk(2, dim=-1)
    return torch.cat((first + second, first - second), dim=-1) * factor


def multiply_by_sylvester(x: torch.Tensor) -> torch.Tensor:
    """The last dimension, a power of two, multiplied by Sylvester's matrix of ±1; neighbours first, halves last."""
    columns, size = x.shape[-1], 1
    while size < columns:
        pairs = x.unflatten(-1, (-1, 2, size))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        size *= 2
    return x
