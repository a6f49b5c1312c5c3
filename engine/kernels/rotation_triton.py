"""`engine.kernels.rotation.rotate` within a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.rotation import BLOCK_SIZES

_LARGE: tl.constexpr = tl.constexpr(BLOCK_SIZES[0])
_MIDDLE: tl.constexpr = tl.constexpr(BLOCK_SIZES[1])
_SMALL: tl.constexpr = tl.constexpr(BLOCK_SIZES[2])
_LARGE_FACTOR: tl.constexpr = tl.constexpr(BLOCK_SIZES[0] ** -0.5)
_MIDDLE_FACTOR: tl.constexpr = tl.constexpr(BLOCK_SIZES[1] ** -0.5)
_SMALL_FACTOR: tl.constexpr = tl.constexpr(BLOCK_SIZES[2] ** -0.5)


@triton.jit
def rotate_columns(values, columns, num_columns):
    """Columns of a row, [BLOCK] float32, rotated.

    Args:
        columns: [BLOCK], consecutive ones from a multiple of 128 on; BLOCK is a multiple of 128.
    """
    small = columns < num_columns // _SMALL * _SMALL
    for level in tl.static_range(5):
        values = tl.where(small, _butterfly(values, 1 << level), values)
    middle = columns < num_columns // _MIDDLE * _MIDDLE
    values = tl.where(middle, _butterfly(values, _SMALL), values)
    large = columns < num_columns // _LARGE * _LARGE
    values = tl.where(large, _butterfly(values, _MIDDLE), values)
    factor = tl.where(
        large, _LARGE_FACTOR, tl.where(middle, _MIDDLE_FACTOR, tl.where(small, _SMALL_FACTOR, 1.0))
    )
    return values * factor


@triton.jit
def _butterfly(values, DISTANCE: tl.constexpr):
    """[BLOCK], in which elements so far apart have become their sum and their difference."""
    BLOCK: tl.constexpr = values.shape[0]
    PAIRS: tl.constexpr = BLOCK // (2 * DISTANCE)
    first, second = tl.split(tl.permute(tl.reshape(values, (PAIRS, 2, DISTANCE)), (0, 2, 1)))
    joined = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
    return tl.reshape(joined, (BLOCK,))
