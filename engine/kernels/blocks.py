"""Codes out of the blocks of a GGUF file's types, on all threads; `engine.loading.gguf.blocks` does without C."""

from __future__ import annotations

import ctypes
from typing import Any, Literal

import numpy as np
import torch

from engine.kernels import cpu

Layout = Literal["bytes", "pairs of 16", "pairs of 32", "fives", "sixes"]
"""How codes lie from their start in a block to its end: each a byte; halves of 16 or 32 bytes, the low ones first; 32
fifth bits before halves of 16 bytes; Q6_K's, whose codes end before the scales do."""

_LAYOUTS: tuple[Layout, ...] = ("bytes", "pairs of 16", "pairs of 32", "fives", "sixes")
_CODES = {"fives": 32, "sixes": 256}


def take_codes(data: np.ndarray[Any, np.dtype[np.uint8]], start: int, layout: Layout) -> torch.Tensor:
    """The codes of a matrix's blocks [N, blocks, bytes], which lie on end in each row.

    Args:
        start: The byte of a block where they begin.

    Returns:
        [N, K] uint8, of four bits [N, K / 2]: neighbours in a byte, the first in its low half.
    """
    rows, num_blocks, block_bytes = data.shape
    width = _CODES.get(layout, block_bytes - start)
    codes = torch.empty(rows, num_blocks * width, dtype=torch.uint8)
    cpu.run(
        "take_codes",
        rows,
        torch.get_num_threads(),
        # C needs the address alone, and torch warns of arrays that are read-only, as a mapped file's are.
        data=torch.frombuffer((ctypes.c_uint8 * 1).from_address(data.ctypes.data), dtype=torch.uint8),
        stride=data.strides[0],
        num_blocks=num_blocks,
        block_bytes=block_bytes,
        start=start,
        layout=_LAYOUTS.index(layout),
        output=codes,
    )
    return codes
