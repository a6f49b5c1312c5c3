"""Checks of paged attention: against attention written out, and row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.gpu.paged import Heads, Sequences, attend, expect, make_sequences
from benchmarks.gpu.steps import Step, Values, equal, rounding, within

BF16, FP16, INT8, FP8 = torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn

LENGTHS = [(5, 1), (11, 7), (0, 200), (0, 1), (3000, 1), (0, 0), (505, 9), (1000, 40), (1500, 300)]
"""A decode in its first block, chunks, fresh prompts, one token alone, long ones, an empty slot."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One check: a model's heads with what its attention sees."""

    heads: Heads
    window: int | None = None
    soft_cap: float = 0.0
    batch_invariant: bool = False

    def __str__(self) -> str:
        heads = self.heads
        kinds = {BF16: "bf16", FP16: "fp16", INT8: "int8", FP8: "fp8", torch.float32: "fp32"}
        text = f"{heads.num_heads}/{heads.num_kv_heads}x{heads.head_dim} {kinds[heads.dtype]}"
        text += f" kv {kinds[heads.cache_dtype]}"
        text += f" window {self.window}" if self.window else ""
        text += f" cap {self.soft_cap:g}" if self.soft_cap else ""
        return text + (" pinned" if self.batch_invariant else "")


LLAMA = Heads(32, 8, 128, BF16, BF16)

VARIANTS = [
    Variant(LLAMA),
    Variant(LLAMA, batch_invariant=True),
    *(
        Variant(replace(LLAMA, cache_dtype=kind), batch_invariant=batch_invariant)
        for kind in (INT8, FP8)
        for batch_invariant in (False, True)
    ),
    Variant(Heads(32, 8, 128, FP16, FP16)),
    Variant(Heads(32, 8, 128, FP16, INT8), batch_invariant=True),
    Variant(Heads(32, 8, 128, FP16, FP8), window=700),
    Variant(LLAMA, window=1024, soft_cap=30.0),
    Variant(LLAMA, window=1024, batch_invariant=True),
    Variant(Heads(9, 3, 64, BF16, BF16), soft_cap=5.0),
    Variant(Heads(9, 3, 64, BF16, INT8), batch_invariant=True),
    Variant(Heads(8, 8, 80, BF16, BF16), window=1),
    Variant(Heads(8, 1, 96, FP16, FP16)),
    Variant(Heads(4, 1, 256, BF16, BF16), window=512),
    Variant(Heads(4, 1, 256, BF16, FP8), batch_invariant=True),
    Variant(Heads(6, 2, 64, torch.float32, torch.float32)),
]


def _reference(variant: Variant, lengths: list[tuple[int, int]], device: torch.device) -> Values:
    sequences = make_sequences(lengths, variant.heads, device)
    output = attend(sequences, variant.window, variant.soft_cap, variant.batch_invariant)
    expected = expect(sequences, variant.window, variant.soft_cap)
    # Weights that sum to 1, of values within 4, are rounded to the queries' type, as is the output; and some
    # thousand float32 sums on the way, those of the scores under an exponential.
    step = rounding(variant.heads.dtype)
    return within(output, expected, step * (4 + expected.abs()) + 2e-4)


def _alone(
    sequences: Sequences, index: int, variant: Variant, first: int = 0, last: int | None = None
) -> torch.Tensor:
    part = sequences.pick(index, first, last)
    return attend(part, variant.window, variant.soft_cap, variant.batch_invariant)


def _rows(variant: Variant, lengths: list[tuple[int, int]], device: torch.device) -> Values:
    """Each sequence alone and in the batch, where a long one alone is split and in a batch perhaps not."""
    sequences = make_sequences(lengths, variant.heads, device)
    together = attend(sequences, variant.window, variant.soft_cap, variant.batch_invariant)
    row = 0
    for index, (start, count) in enumerate(lengths):
        if count:
            what = f"sequence of {count} at {start}"
            equal(_alone(sequences, index, variant), together[row : row + count], what)
        row += count
    return {}


def _chunks(variant: Variant, length: tuple[int, int], device: torch.device) -> Values:
    """A prompt whole, in chunks and token by token."""
    sequences = make_sequences([length], variant.heads, device)
    whole = attend(sequences, variant.window, variant.soft_cap, batch_invariant=True)
    count = length[1]
    for first, last in [
        (0, 1),
        (count // 7, count // 2),
        (count // 2, count // 2 + 1),
        (3, 6),
        (count // 3, count),
    ]:
        chunk = _alone(sequences, 0, variant, first, last)
        equal(chunk, whole[first:last], f"tokens {first} to {last}")
    return {}


def attention_steps(
    device: torch.device, variants: list[Variant] = VARIANTS, lengths: list[tuple[int, int]] = LENGTHS
) -> list[Step]:
    """Every variant against the reference; rows alone, in a batch, and chunked."""
    steps = [
        Step("paged_attention", str(variant), partial(_reference, variant, lengths, device))
        for variant in variants
    ]
    steps += [
        Step("attention rows", f"{variant} rows", partial(_rows, variant, lengths, device))
        for variant in variants
        if not variant.soft_cap
    ]
    return steps + [
        Step("attention rows", f"{variant} chunks", partial(_chunks, variant, lengths[-1], device))
        for variant in variants
        if variant.batch_invariant
    ]
