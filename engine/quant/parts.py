"""How schemes read weights of this engine's own checkpoints; `engine.loading.formats.own` says how they lie there."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kernels.nibbles import unpack_nibbles

ReadPart = Callable[[str, tuple[torch.dtype, ...], tuple[int | None, ...]], torch.Tensor]
"""Reads a part of a module by name: of one of these dtypes, and of this shape, None for any size; else it raises."""


def read_nibbles(read: ReadPart) -> torch.Tensor:
    """Codes of four bits, [N, K] uint8; they are stored in pairs."""
    return unpack_nibbles(read("codes", (torch.uint8,), (None, None)))


def read_groups(
    read: ReadPart, part: str, dtype: torch.dtype, codes: torch.Tensor, group_size: int
) -> torch.Tensor:
    """A number for each group of the codes' columns, [N, ceil(K / group_size)]."""
    return read(part, (dtype,), (codes.shape[0], -(-codes.shape[1] // group_size)))
