"""Weights of whole numbers in groups along K, with floats for each group: what products in groups multiply with.

w[n, k] = v[n, k] * scale[n, g] + minimum[n, g]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.kernels.matmul.sparse24 import CENTRE, SparseCodes
from engine.kernels.nibbles import unpack_nibbles


@dataclass(frozen=True, slots=True)
class GroupNumbers:
    """A number for each group of a weight's rows.

    Attributes:
        values: [N, groups] float16; with steps [N, blocks], of blocks of groups.
        steps: [N, groups] int8: a group's number is so many times its block's value. None: it is the value.
    """

    values: torch.Tensor
    steps: torch.Tensor | None = None

    def expand(self) -> torch.Tensor:
        """[N, groups] float32, exact."""
        if self.steps is None:
            return self.values.float()
        groups = self.steps.shape[1]
        # Blocks have the same number of groups, a power of two, but for the last one.
        a_block = 1 << (-(-groups // self.values.shape[1]) - 1).bit_length()
        return self.steps.float() * self.values.float().repeat_interleave(a_block, dim=1)[:, :groups]

    def rows(self, index: torch.Tensor) -> GroupNumbers:
        """The same of rows in the order of `index`."""
        steps = None if self.steps is None else self.steps.index_select(0, index)
        return GroupNumbers(self.values.index_select(0, index), steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedWeight:
    """A weight [N, K] of whole numbers v, in groups along K.

    v = values[code] with values, else code - offset.

    Attributes:
        codes: [N, K] int8; [N, K] uint8 of fewer bits; or, of four, two in a byte, [N, ceil(K / 2)] uint8.
        in_features: K.
        group_size: Elements along K that share a scale, a power of two and at least 16.
        block_size: Elements along K that share what groups' numbers are steps of; the group size where they are none.
        scale, minimum: None: all of them one; all of them zero.
        bits: Of a code: 4, 5 (then groups have at least 32), 6 or, signed, 8.
        values: [16] int8, of codes of four bits, or None.
        masks: As `SparseCodes` has them; codes are then those that it keeps, of four bits, v is an integer of its
            plus `CENTRE`, and minimums are -`CENTRE` times scales. Or None.
    """

    codes: torch.Tensor
    in_features: int
    group_size: int
    scale: GroupNumbers | None
    minimum: GroupNumbers | None = None
    block_size: int = 0
    bits: int = 8
    offset: int = 0
    values: torch.Tensor | None = None
    masks: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> GroupedWeight:
        """The same with its rows taken in the order of `index`, [R] int32 or int64."""
        scale, minimum = (
            None if numbers is None else numbers.rows(index) for numbers in (self.scale, self.minimum)
        )
        return replace(self, codes=self.codes.index_select(0, index), scale=scale, minimum=minimum)

    def dequantize(self) -> torch.Tensor:
        """w, [N, K] float32; products of v and scale are exact where a scale has few bits, as GGUF's do."""

        def spread(numbers: GroupNumbers) -> torch.Tensor:
            return numbers.expand().repeat_interleave(self.group_size, dim=1)[:, : self.in_features]

        values = self.integers()
        if self.scale is not None:
            values = values.mul_(spread(self.scale))
        return values if self.minimum is None else values.add_(spread(self.minimum))

    def integers(self) -> torch.Tensor:
        """v, [N, K] float32."""
        if self.masks is not None:
            return SparseCodes(self.codes, self.masks).expand().float() + CENTRE
        codes = unpack_nibbles(self.codes)[:, : self.in_features] if self.bits == 4 else self.codes
        return codes.float() - self.offset if self.values is None else self.values.float()[codes.long()]
