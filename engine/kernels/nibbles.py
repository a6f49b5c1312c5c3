"""Two codes of four bits in a byte."""

from __future__ import annotations

import torch


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[N, K] uint8 of 0..15 → [N, ceil(K / 2)] uint8, the even k in the low nibble."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[N, B] uint8 → [N, 2 * B] uint8 of 0..15, the low nibbles at even places."""
    return torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
