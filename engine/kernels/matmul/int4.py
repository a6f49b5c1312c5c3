"""Float activations × int4 weights in groups along K. See `engine.quant.int4` for the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.kernels.launch import runs_triton, target_of, tiles
from engine.kernels.matmul.sparse24 import SparseCodes, split_sparse
from engine.kernels.nibbles import unpack_nibbles
from engine.kernels.operands import Activations, Format, GroupSums, SumsFormat, num_tokens

PLANES = 4
"""Nibbles in a word."""

PLANE = 32
"""Words in a row's block, whose nibbles of one place are consecutive along K and lie in one group."""

BLOCK = PLANES * PLANE
"""Elements along K in a block of packed words."""


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, group_size: int, in_features: int
) -> torch.Tensor:
    """[N, K] float32 from nibbles [N, ceil(K / 2)] uint8 and fp16 scale and minimum [N, groups]."""
    nibbles = unpack_nibbles(codes)
    padding = scale.shape[1] * group_size - nibbles.shape[1]
    groups = F.pad(nibbles, (0, padding)).view(*scale.shape, group_size)
    values = torch.addcmul(minimum.float()[:, :, None], groups.float(), scale.float()[:, :, None])
    return values.view(codes.shape[0], -1)[:, :in_features]


def reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[M, K] float × int4 weight + bias [N] → [M, N], in float32."""
    weight = dequantize(codes, scale, minimum, group_size, x.shape[1])
    return F.linear(x.float(), weight, bias).to(x.dtype)


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """An int4 weight [N, K] as the Triton bodies read it.

    A row's block of 128 elements is 32 words of 16 bits; word j of block b holds the code of element
    128 b + 32 i + j in its bits 4 i … 4 i + 3. So a row's block is 64 bytes on end, and the words that a thread
    takes for one plane of 32 elements serve it for the other three. K is padded to whole blocks.

    Attributes:
        words: [ceil(K / 128), N, 32] int16; or sparse codes of four bits, as they are.
        scale, minimum: [groups of the padded K, N] float16; zeros where padded. No minimum: -`CENTRE` * scale.
    """

    words: torch.Tensor | SparseCodes
    scale: torch.Tensor
    minimum: torch.Tensor | None
    group_size: int

    @property
    def out_features(self) -> int:
        return self.scale.shape[1]

    def arguments(self) -> dict[str, torch.Tensor | None]:
        """What the kernels take of it."""
        words, masks = split_sparse(self.words)
        return {"words": words, "masks": masks, "scale": self.scale, "minimum": self.minimum}


def pack(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, group_size: int) -> PackedInt4:
    """Packs codes [N, ceil(K / 2)] uint8 and fp16 scale and minimum [N, groups], on their device."""
    words = pack_words(codes)
    padding = (0, words.shape[0] * BLOCK // group_size - scale.shape[1])
    scale, minimum = (F.pad(values, padding).t().contiguous() for values in (scale, minimum))
    return PackedInt4(words, scale, minimum, group_size)


def pack_sparse(codes: SparseCodes, scale: torch.Tensor, group_size: int) -> PackedInt4:
    """Packs sparse codes and an fp16 scale [N, groups], on their device."""
    padding = (0, -(-codes.shape[1] // BLOCK) * BLOCK // group_size - scale.shape[1])
    return PackedInt4(codes, F.pad(scale, padding).t().contiguous(), None, group_size)


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """The words of `PackedInt4`, [ceil(K / 128), N, 32] int16, of codes [N, ceil(K / 2)] uint8."""
    out_features, num_blocks = codes.shape[0], -(-2 * codes.shape[1] // BLOCK)
    words = torch.empty(num_blocks, out_features, PLANE, dtype=torch.int16, device=codes.device)
    # By rows, so that what lies between the two forms takes little memory.
    for start in range(0, out_features, 4096):
        rows = codes[start : start + 4096]
        rows = F.pad(rows, (0, num_blocks * BLOCK // 2 - rows.shape[1]))
        nibbles = unpack_nibbles(rows).view(-1, num_blocks, PLANES, PLANE)
        packed = torch.zeros_like(nibbles[:, :, 0], dtype=torch.int16)
        for plane in range(PLANES):
            packed |= nibbles[:, :, plane].to(torch.int16) << (4 * plane)
        words[:, start : start + 4096] = packed.transpose(0, 1)
    return words


class Int4Matmul:
    """The product of float activations with one int4 weight.

    Args:
        codes: [N, ceil(K / 2)] uint8, element k in byte k // 2, the even ones in the low nibble; or sparse ones.
        scale, minimum: [N, groups] float16; no minimum where codes are sparse.
        group_size: 32, 64 or 128.
        bias: [N] float32, added to the float32 sums.
        batch_invariant: One form for any number of tokens, so that a token's bits do not depend on it.

    Attributes:
        format: What the product's activations are wanted as.
    """

    def __init__(
        self,
        codes: torch.Tensor | SparseCodes,
        scale: torch.Tensor,
        minimum: torch.Tensor | None,
        group_size: int,
        bias: torch.Tensor | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self.group_size, self.bias, self.batch_invariant = group_size, bias, batch_invariant
        if isinstance(codes, SparseCodes):
            self.weight = pack_sparse(codes, scale, group_size)
        else:
            assert minimum is not None
            self.weight = pack(codes, scale, minimum, group_size)
            if not runs_triton(scale):
                self._grid = codes, scale, minimum
        if runs_triton(scale):
            from engine.kernels.matmul.segments_triton import new_counters

            self.counters = new_counters(len(scale), scale.device)
        self.format: Format = SumsFormat()

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] float → [M, N] of x's dtype."""
        assert isinstance(x, torch.Tensor | GroupSums)
        target = target_of(self.weight.scale)
        if target is None:
            values = x.values if isinstance(x, GroupSums) else x
            return reference(values, *self._grid, self.group_size, self.bias)
        from engine.kernels.matmul.group_sums_triton import group_sums
        from engine.kernels.matmul.int4_triton import int4_large, int4_segments

        # The last tile, for any number of tokens, is there for the batch-invariant form.
        limit = max(tile.max_tokens or 0 for tile in tiles(target, "int4_matmul.segments"))
        if self.batch_invariant or num_tokens(x) <= limit:
            sums = x if isinstance(x, GroupSums) else group_sums(x)
            return int4_segments(sums, self.weight, self.bias, self.counters)
        return int4_large(x.values if isinstance(x, GroupSums) else x, self.weight, self.bias)
