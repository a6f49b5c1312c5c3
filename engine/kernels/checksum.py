"""A checksum of a tensor's bytes, as fast as memory is read: for files that may have been damaged, not by intent.

The bytes are rows of LANES words of 32 bits, the last row filled up with zeros. Lane by lane, from row to row,

    h = (h xor word) * PRIME mod 2^32,      PRIME = 2654435761 (Knuth's multiplicative constant),

starting from the number of the block that the row lies in, of ROWS rows; a block's sum is that of h * (2 lane + 1),
and the checksum that of all blocks' sums, mod 2^32, beside the number of bytes. Each step is invertible in `h` and in
the word: a change of one word always changes its lane, and a change of several goes unseen once in 2^32 times.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.kernels import cpu

LANES, ROWS = 1024, 256
PRIME = 2654435761
_BLOCK = LANES * ROWS


def checksum(tensor: torch.Tensor) -> str:
    """The number of a CPU tensor's bytes, and their checksum, in hexadecimal digits."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = _reference(data) if cpu.library() is None else _in_c(data)
    return f"{data.numel():x}-{total:08x}"


def _in_c(data: torch.Tensor) -> int:
    num_blocks = -(-data.numel() // (4 * _BLOCK))
    sums = torch.empty(num_blocks, dtype=torch.int32)
    if num_blocks:
        cpu.run("checksum", num_blocks, data=data, num_bytes=data.numel(), sums=sums)
    return int(sums.long().sum()) & 0xFFFFFFFF


def _reference(data: torch.Tensor) -> int:
    array = data.numpy()
    words = np.zeros(-(-len(array) // (4 * LANES)) * LANES, np.uint32)
    words.view(np.uint8)[: len(array)] = array
    rows = words.reshape(-1, LANES)
    weights = 2 * np.arange(LANES, dtype=np.uint32) + 1
    total = 0
    for block, start in enumerate(range(0, len(rows), ROWS)):
        h = np.full(LANES, block, np.uint32)
        for row in rows[start : start + ROWS]:
            h = (h ^ row) * np.uint32(PRIME)
        total += int((h * weights).sum(dtype=np.uint64))
    return total & 0xFFFFFFFF
