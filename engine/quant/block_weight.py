"""Weights as GGUF's types keep them: codes of four to six bits in groups along K, with scales of their own kind.

    w[n, k] = v[n, k] * scale[n, g] + minimum[n, g]          v = code - offset, or values[code]

A group's scale and minimum are fp16 (the types of llama.cpp's first generation), or whole numbers of at most seven
bits times an fp16 number of a block of 256 (its "k-quants"). All products here are exact in float32.

Source: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/llama.cpp; MXFP4 is that of the Open Compute
Project's Microscaling formats (arXiv:2310.10537).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.matmul.grouped_weight import GroupedWeight, GroupNumbers

Parts = dict[str, torch.Tensor]

K_BLOCK = 256
"""Elements along K in a block of the "k-quants"."""

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the numbers of four bits that MXFP4 has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """How one type stores a weight.

    Attributes:
        bits: Of a code: 4, of which a byte has two, or 5 or 6, of which it has one.
        group_size: Elements along K that share a scale.
        block_size: Elements along K whose scales are steps of one number; 0: scales are numbers of their own.
        has_minimum: Whether groups have one.
        offset: v is so much less than the code.
        values: v by code; empty: it is the code less the offset.
    """

    bits: int = 4
    group_size: int = 32
    block_size: int = 0
    has_minimum: bool = False
    offset: int = 0
    values: tuple[int, ...] = ()

    def parts(self, rows: int, columns: int, device: torch.device | str = "meta") -> Parts:
        """Empty parts of a weight [rows, columns]: codes, scale and minimum, and the steps of the latter two."""
        groups = -(-columns // self.group_size)
        sizes = {"codes": (columns + 1) // 2 if self.bits == 4 else columns}
        for name in ("scale", "minimum") if self.has_minimum else ("scale",):
            if self.block_size:
                sizes[f"{name}_steps"] = groups
            sizes[name] = -(-columns // self.block_size) if self.block_size else groups
        dtypes = {"codes": torch.uint8, "scale_steps": torch.int8, "minimum_steps": torch.int8}
        return {
            name: torch.empty(rows, size, dtype=dtypes.get(name, torch.float16), device=device)
            for name, size in sizes.items()
        }

    def grouped(self, parts: Parts, in_features: int) -> GroupedWeight:
        """The weight as products take it."""
        return GroupedWeight(
            codes=parts["codes"],
            in_features=in_features,
            group_size=self.group_size,
            block_size=self.block_size,
            scale=GroupNumbers(parts["scale"], parts.get("scale_steps")),
            minimum=GroupNumbers(parts["minimum"], parts.get("minimum_steps")) if self.has_minimum else None,
            bits=self.bits,
            offset=self.offset,
            values=torch.tensor(self.values, dtype=torch.int8) if self.values else None,
        )


BLOCK_TYPES = {
    "q4_0": BlockType(offset=8),
    "q4_1": BlockType(has_minimum=True),
    "q4_k": BlockType(block_size=K_BLOCK, has_minimum=True),
    "q5_0": BlockType(bits=5, offset=16),
    "q5_1": BlockType(bits=5, has_minimum=True),
    "q5_k": BlockType(bits=5, block_size=K_BLOCK, has_minimum=True),
    "q6_k": BlockType(bits=6, group_size=16, block_size=K_BLOCK, offset=32),
    "iq4_nl": BlockType(values=IQ4_VALUES),
    "iq4_xs": BlockType(block_size=K_BLOCK, values=IQ4_VALUES),
    "mxfp4": BlockType(values=E2M1_TWICE),
}
"""By the names of the types in lower case; Q8_0 is int8 in groups of 32."""


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """A matrix of one of `BLOCK_TYPES`.

    Attributes:
        kind: The type's name.
        parts: As `BlockType.parts` has them.
        in_features: K.
    """

    kind: str
    parts: Parts
    in_features: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.parts["codes"]), self.in_features))

    @property
    def step(self) -> int:
        """Columns can be cut between multiples of it."""
        of_type = BLOCK_TYPES[self.kind]
        return of_type.block_size or of_type.group_size

    @property
    def grouped(self) -> GroupedWeight:
        """The weight as products take it."""
        return BLOCK_TYPES[self.kind].grouped(self.parts, self.in_features)

    def dequantize(self) -> torch.Tensor:
        """The weight as floats, [N, K] float32."""
        return self.grouped.dequantize()

    def rows(self, index: torch.Tensor) -> BlockWeight:
        """The same grid with its rows taken in the order of `index` ([N] int64)."""
        parts = {name: part.index_select(0, index) for name, part in self.parts.items()}
        return BlockWeight(self.kind, parts, self.in_features)

    def is_cut_by(self, columns: slice) -> bool:
        """Whether columns begin or end amid a block of several groups."""
        has_blocks = BLOCK_TYPES[self.kind].block_size > 0
        return has_blocks and any(end % self.step for end in (columns.start, columns.stop))

    def cut(self, rows: slice, columns: slice) -> BlockWeight:
        """Some rows and columns; these start at a multiple of `step`, and end at one or with the matrix."""
        width = columns.stop - columns.start
        sizes = BLOCK_TYPES[self.kind].parts(0, width)
        starts = BLOCK_TYPES[self.kind].parts(0, columns.start)
        parts = {
            name: part[rows, starts[name].shape[1] : starts[name].shape[1] + sizes[name].shape[1]]
            for name, part in self.parts.items()
        }
        return BlockWeight(self.kind, parts, width)
