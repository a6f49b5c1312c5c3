"""What Triton's products make of sparse codes (`engine.kernels.matmul.sparse24`): a tile of the dense weight, in
registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_sparse(kept, masks, rows, columns, in_features, BITS: tl.constexpr):
    """Codes of a dense weight, zeros of K among them: rows [R] int64, columns [C] → [R, C].

    Of eight bits int8, and zeros beyond K; of four int32 of 0 … 15, 8 for zeros.
    """
    fours = columns // 4
    mask_bytes = tl.cdiv(in_features, 8)
    is_column = (columns < in_features)[None, :]
    both = tl.load(masks + rows[:, None] * mask_bytes + (fours // 2)[None, :], is_column, 0).to(tl.int32)
    mask = (both >> (fours % 2 * 4)[None, :]) & 15
    is_kept = ((mask >> (columns % 4)[None, :]) & 1) == 1
    # Of two codes the second one where another element is kept before.
    slot = ((mask & ((1 << (columns % 4)) - 1)[None, :]) != 0).to(tl.int32)
    if BITS == 8:
        codes = kept + rows[:, None] * (in_features // 2) + 2 * fours[None, :] + slot
        return tl.load(codes, is_kept & is_column, 0)
    else:
        pair = tl.load(kept + rows[:, None] * (in_features // 4) + fours[None, :], is_column, 0).to(tl.int32)
        return tl.where(is_kept, (pair >> (4 * slot)) & 15, 8)
