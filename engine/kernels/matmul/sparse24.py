"""Weights of which each four along K have at most two that are not zero: two codes are kept of each four.

    mask      two of the four bits of a four are set, bit j for element 4 f + j
    kept      two codes a four: those of the elements whose bits are set, in their order; zero where a four has fewer

The kept codes and masks of a weight of eight bits take five bits an element, of four bits three. Products with such a
weight are those with the dense one: sums of integers miss nothing but zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.nibbles import pack_nibbles, unpack_nibbles

FOUR = 4
"""Elements along K of which two are kept."""

CENTRE = 8
"""What codes of four bits have too much: they stand for -8 … 7."""

_ROWS = 1024
"""Rows that are compressed at a time, so that what lies between the two forms takes little memory."""


def _with_two_bits(mask: int) -> int:
    """A mask with the lowest free bits set until there are two; 0 for one that has more."""
    if mask.bit_count() > 2:
        return 0
    while mask.bit_count() < 2:
        mask |= ~mask & (mask + 1)
    return mask


_MASKS = torch.tensor([_with_two_bits(mask) for mask in range(16)], dtype=torch.uint8)
_FIRST = torch.tensor(
    [(mask & -mask).bit_length() - 1 if mask else 0 for mask in range(16)], dtype=torch.uint8
)
_LAST = torch.tensor([max(mask.bit_length() - 1, 0) for mask in range(16)], dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class SparseCodes:
    """The integers of a weight [N, K] of at most two in each four that are not zero; K is a multiple of four.

    Attributes:
        kept: [N, K / 2] int8; or, of four bits, [N, K / 4] uint8: the integers plus `CENTRE`, a four's first one in
            the low nibble.
        masks: [N, ceil(K / 8)] uint8: those of two fours, the first one's in the low nibble.
    """

    kept: torch.Tensor
    masks: torch.Tensor

    @property
    def bits(self) -> int:
        """How many bits a code has: 8 or 4."""
        return 8 if self.kept.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.kept.shape[0], self.kept.shape[1] * (2 if self.bits == 8 else FOUR)

    def expand(self, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows of the integers, [end - start, K] int8."""
        kept = self.kept[start:end]
        if self.bits == 4:
            kept = unpack_nibbles(kept).to(torch.int8) - CENTRE
        masks = unpack_nibbles(self.masks[start:end])[:, : kept.shape[1] // 2]
        dense = torch.zeros(*masks.shape, FOUR, dtype=torch.int8, device=kept.device)
        for slot, places in enumerate((_FIRST, _LAST)):
            index = places.to(kept.device)[masks.long()].long()[:, :, None]
            dense.scatter_(2, index, kept[:, slot::2, None])
        return dense.flatten(1)


def split_sparse(weight: torch.Tensor | SparseCodes) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a kernel reads of a weight that may be sparse: codes, and masks or None."""
    return (weight.kept, weight.masks) if isinstance(weight, SparseCodes) else (weight, None)


def compress(integers: torch.Tensor, bits: int) -> SparseCodes:
    """The kept codes of integers.

    Args:
        integers: [N, K] int8, of which no four along K has more than two that are not zero: see `first_dense_four`;
            -8 … 7 where they get four bits. K is a multiple of four.
        bits: 8 or 4.
    """
    parts = [_compress(rows, bits) for rows in torch.split(integers, _ROWS)]
    return SparseCodes(torch.cat([part.kept for part in parts]), torch.cat([part.masks for part in parts]))


def _compress(integers: torch.Tensor, bits: int) -> SparseCodes:
    fours = integers.unflatten(1, (-1, FOUR))
    masks = _MASKS.to(integers.device)[_nonzero_masks(fours).long()]
    kept = torch.stack(
        [
            fours.gather(2, places.to(integers.device)[masks.long()].long()[:, :, None])[:, :, 0]
            for places in (_FIRST, _LAST)
        ],
        dim=2,
    ).flatten(1)
    if bits == 4:
        kept = pack_nibbles((kept + CENTRE).to(torch.uint8))
    return SparseCodes(kept, pack_nibbles(masks))


def _nonzero_masks(fours: torch.Tensor) -> torch.Tensor:
    """[N, K / 4, 4] → which of each four are not zero, [N, K / 4] uint8."""
    powers = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=fours.device)
    return ((fours != 0) * powers).sum(dim=2, dtype=torch.uint8)


def first_dense_four(integers: torch.Tensor) -> tuple[int, int] | None:
    """Row and first column of the first four along K with more than two elements that are not zero, or None.

    Args:
        integers: [N, K], K a multiple of four.
    """
    for start, rows in enumerate(torch.split(integers, _ROWS)):
        is_dense = (rows.unflatten(1, (-1, FOUR)) != 0).sum(dim=2) > 2
        if bool(is_dense.any()):
            row, four = is_dense.nonzero()[0].tolist()
            return start * _ROWS + row, four * FOUR
    return None
