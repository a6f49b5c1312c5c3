"""Sums along K in segments: the order of addition that the float products keep for every M, N and tile.

K is cut into segments of a fixed length. Each segment has a float32 sum of its own, and the total is
((s0 + s1) + s2) + …. Who computes the segments is then free: one program all of them, or several programs some
each, of which the last to arrive at an output tile adds the partial sums in order. Both give the same bits.

Tiles are transposed, [BLOCK_N, BLOCK_M]: features × tokens. A launch has the grid (tiles along N, programs a
tile, tiles along M).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.kernels.launch import Target, Tile

SEGMENT = 1024
"""Elements along K in a segment. Part of the arithmetic: another length gives other bits."""

MAX_SPLIT_TOKENS = 128
"""A tile for up to so many tokens may have its segments shared; more tokens fill a chip with tiles."""

WARPS_PER_PROCESSOR = 16
"""Warps that a processor is to hold, so that enough bytes are on their way to it."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the segments of an output tile are shared.

    Attributes:
        programs: Programs an output tile.
        segments: Segments that each of them sums; what is left for the last.
        partials: Room for the sums [segments, output tiles, BLOCK_N, BLOCK_M] float32; None where one program
            adds them up as it goes.
    """

    programs: int
    segments: int
    partials: torch.Tensor | None


def plan_split(
    target: Target, tile: Tile, x: torch.Tensor, out_features: int, segments_per_program: int | None = None
) -> Split:
    """Shares the segments of x [M, K] × [N, K] such that the programs just fill the chip."""
    num_tokens, in_features = x.shape
    num_segments = triton.cdiv(in_features, SEGMENT)
    if tile.max_tokens is None or tile.max_tokens > MAX_SPLIT_TOKENS:
        return Split(1, num_segments, None)
    n_tiles, block_m = triton.cdiv(out_features, tile["BLOCK_N"]), tile["BLOCK_M"]
    if segments_per_program is None:
        # For as many tokens as the tile serves: the number of tokens must not decide which kernel is compiled.
        num_tiles = n_tiles * triton.cdiv(tile.max_tokens, block_m)
        room = target.num_processors * max(1, WARPS_PER_PROCESSOR // tile.num_warps)
        segments_per_program = triton.cdiv(num_tiles * num_segments, room)
    if segments_per_program >= num_segments:
        return Split(1, num_segments, None)
    size = num_segments * n_tiles * triton.cdiv(num_tokens, block_m) * tile["BLOCK_N"] * block_m
    partials = torch.empty(size, dtype=torch.float32, device=x.device)
    return Split(triton.cdiv(num_segments, segments_per_program), segments_per_program, partials)


def new_counters(out_features: int, device: torch.device) -> torch.Tensor:
    """Arrivals at each output tile of a launch that is shared: zero, and zero again after each launch.

    Launches that share counters run one after another.
    """
    # The smallest tile has 16 features and 16 tokens.
    size = triton.cdiv(out_features, 16) * (MAX_SPLIT_TOKENS // 16)
    return torch.zeros(size, dtype=torch.int32, device=device)


@triton.jit
def load_groups(values, step, rows, row_stride, group_stride, num_groups, GROUPS: tl.constexpr):
    """One value [BLOCK_N] for each of a step's groups; the last group's for those past the end.

    The compiler does not pipeline what no product takes: a caller loads these a step ahead.
    """
    loaded = ()
    for i in tl.static_range(GROUPS):
        group = tl.minimum(step * GROUPS + i, num_groups - 1)
        value = tl.load(values + group * group_stride + rows * row_stride)
        # Triton knows no unpacking.
        loaded = loaded + (value,)  # type: ignore[assignment]  # noqa: RUF005
    return loaded


@triton.jit
def partial_pointers(partials, segment, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where a segment's sum of this program's tile lies."""
    num_tiles = tl.num_programs(0) * tl.num_programs(2)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    start = (tl.cast(segment, tl.int64) * num_tiles + tile) * (BLOCK_N * BLOCK_M)
    return partials + start + tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]


@triton.jit
def finish_tile(
    output,
    total,
    scale,
    bias,
    partials,
    counters,
    num_tokens,
    out_features,
    num_segments,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Stores the total; where it is shared, the last program to arrive does, from the partials."""
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    if partials is None:
        store_tile(output, total, scale, bias, features, tokens, num_tokens, out_features)
    else:
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        # Every thread's partial sums are stored before one thread releases them.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if arrived == tl.num_programs(1) - 1:
            tl.store(counter, 0)
            # Unrolled to have several loads under way; past the first-level cache, which other processors'
            # stores do not reach.
            for segment in tl.range(0, num_segments, loop_unroll_factor=4):
                pointers = partial_pointers(partials, segment, BLOCK_N, BLOCK_M)
                total += tl.load(pointers, cache_modifier=".cg")
            store_tile(output, total, scale, bias, features, tokens, num_tokens, out_features)


@triton.jit
def store_tile(output, total, scale, bias, features, tokens, num_tokens, out_features):
    """Stores a transposed tile, times scale [N], plus bias [N] (either may be None), to output [M, N]."""
    is_feature = features < out_features
    if scale is not None:
        total *= tl.load(scale + features, is_feature, 0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + features, is_feature, 0.0)[:, None]
    pointers = output + tokens.to(tl.int64)[:, None] * out_features + features[None, :]
    values = tl.trans(total).to(output.dtype.element_ty)
    tl.store(pointers, values, (tokens < num_tokens)[:, None] & is_feature[None, :])
