"""`engine.kernels.hadamard.spread_heads` within a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread_halves(low, high, factor, LEVELS: tl.constexpr):
    """`spread_heads` of both halves of heads, [H, D] float32 each.

    Args:
        factor: [H, 1] float32.
    """
    low, high = _spread(low, LEVELS), _spread(high, LEVELS)
    return (low + high) * factor, (low - high) * factor


@triton.jit
def _spread(x, LEVELS: tl.constexpr):
    """Pieces of 2^LEVELS elements of [H, D], multiplied by Sylvester's matrix.

    One stage is as the other (Pease 1968): neighbours' sums go to the piece's first half, differences to its second.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    SIZE: tl.constexpr = 1 << LEVELS
    PIECES: tl.constexpr = COLUMNS // SIZE
    for _ in tl.static_range(LEVELS):
        first, second = tl.split(tl.reshape(x, (ROWS, PIECES, SIZE // 2, 2)))
        x = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
    return tl.reshape(x, (ROWS, COLUMNS))
