"""The Triton bodies of `engine.kernels.matmul.int4`.

They compute the product transposed, weights × activations: unpacked in registers, the weights
are the left operand of the matrix instruction, and the tokens its columns, so that few of them waste little and
their number does not change the order of addition. There are two forms:

- segments: a group adds scale[n, g] · Σ codes[n, k] · x[m, k] + minimum[n, g] · sums[m, g], with the sums of x that
  come with it (`GroupSums`).
  The codes are exact in x's type, so nothing is rounded before the float32 sums; see
  `engine.kernels.matmul.segments_triton` for their order. For few tokens by default, for any
  number of them where it must be batch invariant.
- large: tiles of weights are dequantized to x's type, which costs less a product but rounds each weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import Tile, launch, select_tile, target_of
from engine.kernels.matmul.int4 import BLOCK, PLANES, PackedInt4
from engine.kernels.matmul.segments_triton import (
    SEGMENT,
    finish_tile,
    load_groups,
    partial_pointers,
    plan_split,
    store_tile,
)
from engine.kernels.matmul.sparse24_triton import load_sparse
from engine.kernels.operands import GroupSums


def _assembly(plane: int, magic: str, subtract: str) -> str:
    """PTX: the codes of a plane in two words, as two floats of 16 bits."""
    # In the lowest bits of a float whose last bit is worth 1, a code adds itself to that float's power of two.
    return f"""{{
        .reg .b32 codes, one, power;
        shr.b32 codes, $1, {4 * plane};
        lop3.b32 codes, codes, 0x000F000F, {magic}, 0xEA;
        {subtract}
    }}"""


_BF16 = tl.constexpr(
    tuple(
        _assembly(
            plane,
            "0x43004300",
            "mov.b32 one, 0x3F803F80; mov.b32 power, 0xC300C300; fma.rn.bf16x2 $0, codes, one, power;",
        )
        for plane in range(PLANES)
    )
)

_FP16 = tl.constexpr(
    tuple(
        _assembly(plane, "0x64006400", "mov.b32 power, 0x64006400; sub.rn.f16x2 $0, codes, power;")
        for plane in range(PLANES)
    )
)


@triton.jit
def codes_of_planes(
    words, plane: tl.constexpr, PLANES: tl.constexpr, dtype: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """Words [BLOCK_N, 32] → codes 0 … 15 [BLOCK_N, 32 PLANES] of the planes from `plane` on, exact in dtype."""
    if PLANES == 2:
        pair = tl.join(
            codes_of_planes(words, plane, 1, dtype, ASSEMBLY),
            codes_of_planes(words, plane + 1, 1, dtype, ASSEMBLY),
        )
        return tl.reshape(tl.permute(pair, (0, 2, 1)), (words.shape[0], 2 * words.shape[1]))
    elif ASSEMBLY and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _BF16[plane], "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif ASSEMBLY and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            _FP16[plane], "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return ((words >> (4 * plane)) & 15).to(dtype)


@triton.jit
def _load_minimums(
    minimum, scale, segment, features, out_features, num_groups, SUMS: tl.constexpr, RATIO: tl.constexpr
):
    """A segment's minimums [BLOCK_N, SUMS], each as often as there are sums in its group."""
    groups = (segment * SUMS + tl.arange(0, SUMS)) // RATIO
    places = groups[None, :] * out_features + features[:, None]
    is_there = (groups < num_groups)[None, :] & (features < out_features)[:, None]
    if minimum is None:
        return tl.load(scale + places, is_there, 0.0) * -8
    else:
        return tl.load(minimum + places, is_there, 0.0)


@triton.jit
def _load_sums(sums, segment, tokens, num_tokens, num_sums, SUMS: tl.constexpr):
    """A segment's sums [BLOCK_M, SUMS]."""
    columns = segment * SUMS + tl.arange(0, SUMS)
    return tl.load(
        sums + tokens[:, None] * num_sums + columns[None, :],
        (tokens < num_tokens)[:, None] & (columns < num_sums)[None, :],
        0.0,
    )


@triton.jit
def _multiply_sums(minimums, sums, PRECISION: tl.constexpr):
    """[BLOCK_N, SUMS] float16 × [BLOCK_M, SUMS] float32 → [BLOCK_N, BLOCK_M], with tf32 products.

    A float16 is exact in tf32, and a float32 is but for a 2^-22 of it the sum of two.
    """
    high = (sums.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    left = minimums.to(tl.float32)
    product = tl.dot(left, tl.trans(sums - high), input_precision=PRECISION)
    return tl.dot(left, tl.trans(high), product, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_tokens", "segments_per_program"])
def _int4_segments_kernel(
    x,
    sums,
    words,
    masks,
    scale,
    minimum,
    bias,
    output,
    partials,
    counters,
    num_tokens,
    segments_per_program,
    in_features,
    out_features,
    num_sums,
    GROUP_SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Two planes a product, or one where it is a group: the registers of four would keep programs off a processor.
    PLANES: tl.constexpr = 1 if GROUP_SIZE == 32 else 2
    WIDTH: tl.constexpr = PLANES * 32
    STEPS: tl.constexpr = SEGMENT // BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // GROUP_SIZE
    SUMS: tl.constexpr = SEGMENT // 32
    RATIO: tl.constexpr = GROUP_SIZE // 32
    # bf16 products are wrong in the interpreter.
    dtype: tl.constexpr = tl.float32 if INTERPRETED else x.dtype.element_ty
    # AMD's instruction takes float32 itself.
    PRECISION: tl.constexpr = "tf32" if ASSEMBLY else "ieee"

    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = (tokens < num_tokens)[:, None]
    # Rows past the end read the last one's weights; their products are not stored.
    rows = tl.minimum(features, out_features - 1)
    columns = tl.arange(0, WIDTH)
    x_rows = x + tokens.to(tl.int64)[:, None] * in_features + columns[None, :]
    if masks is None:
        word_rows = words + rows[:, None] * 32 + tl.arange(0, 32)[None, :]
    block_stride = tl.cast(out_features, tl.int64) * 32
    num_blocks = tl.cdiv(in_features, 128)
    num_groups = num_blocks * (128 // GROUP_SIZE)
    first = tl.program_id(1) * segments_per_program
    end = tl.minimum((first + segments_per_program) * STEPS, tl.cdiv(in_features, BLOCK_K))

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    segment_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Read a step ahead, and a segment ahead: see `load_groups`.
    scales = load_groups(scale, first * STEPS, rows, 1, out_features, num_groups, GROUPS)
    minimums = _load_minimums(minimum, scale, first, features, out_features, num_groups, SUMS, RATIO)
    segment_sums = _load_sums(sums, first, tokens, num_tokens, num_sums, SUMS)
    for step in range(first * STEPS, end):
        next_scales = load_groups(scale, step + 1, rows, 1, out_features, num_groups, GROUPS)
        for part in tl.static_range(BLOCK_K // 128):
            block = step * (BLOCK_K // 128) + part
            if masks is None:
                packed = tl.load(word_rows + tl.minimum(block, num_blocks - 1) * block_stride)
            for plane in tl.static_range(0, 4, PLANES):
                start = block * 128 + plane * 32
                is_x = is_token
                if HAS_TAIL:
                    is_x = is_x & (start + columns < in_features)[None, :]
                values = tl.trans(tl.load(x_rows + start, is_x, 0.0).to(dtype))
                if masks is None:
                    codes = codes_of_planes(packed, plane, PLANES, dtype, ASSEMBLY)
                else:
                    codes = load_sparse(words, masks, rows.to(tl.int64), start + columns, in_features, 4).to(
                        dtype
                    )
                if plane * 32 % GROUP_SIZE == 0:
                    product = tl.dot(codes, values, input_precision="ieee")
                else:
                    product = tl.dot(codes, values, product, input_precision="ieee")
                if (plane + PLANES) * 32 % GROUP_SIZE == 0:
                    group_scale = scales[(part * 128 + plane * 32) // GROUP_SIZE].to(tl.float32)
                    group_scale = tl.broadcast_to(group_scale[:, None], (BLOCK_N, BLOCK_M))
                    segment_total = tl.fma(product, group_scale, segment_total)
        scales = next_scales
        if (step + 1) % STEPS == 0 or step + 1 == end:
            segment = step // STEPS
            segment_total += _multiply_sums(minimums, segment_sums, PRECISION)
            minimums = _load_minimums(
                minimum, scale, segment + 1, features, out_features, num_groups, SUMS, RATIO
            )
            segment_sums = _load_sums(sums, segment + 1, tokens, num_tokens, num_sums, SUMS)
            if partials is not None:
                tl.store(partial_pointers(partials, segment, BLOCK_N, BLOCK_M), segment_total)
            else:
                total += segment_total
            segment_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    num_segments = tl.cdiv(in_features, SEGMENT)
    finish_tile(
        output,
        total,
        None,
        bias,
        partials,
        counters,
        num_tokens,
        out_features,
        num_segments,
        BLOCK_N,
        BLOCK_M,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _int4_large_kernel(
    x,
    words,
    masks,
    scale,
    minimum,
    bias,
    output,
    num_tokens,
    in_features,
    out_features,
    GROUP_SIZE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PLANES: tl.constexpr = 1 if GROUP_SIZE == 32 else 2
    WIDTH: tl.constexpr = PLANES * 32
    GROUPS: tl.constexpr = 128 // GROUP_SIZE
    dtype: tl.constexpr = tl.float32 if INTERPRETED else x.dtype.element_ty
    # Neighbouring programs share tokens and weights in the second-level cache.
    m_tile, n_tile = tl.swizzle2d(
        tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1), 8
    )
    features = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = (tokens < num_tokens)[:, None]
    rows = tl.minimum(features, out_features - 1)
    columns = tl.arange(0, WIDTH)
    x_rows = x + tokens.to(tl.int64)[:, None] * in_features + columns[None, :]
    if masks is None:
        word_rows = words + rows[:, None] * 32 + tl.arange(0, 32)[None, :]
    block_stride = tl.cast(out_features, tl.int64) * 32
    num_blocks = tl.cdiv(in_features, 128)
    num_groups = num_blocks * GROUPS

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(num_blocks):
        scales = load_groups(scale, block, rows, 1, out_features, num_groups, GROUPS)
        if masks is None:
            minimums = load_groups(minimum, block, rows, 1, out_features, num_groups, GROUPS)
            packed = tl.load(word_rows + block * block_stride)
        for plane in tl.static_range(0, 4, PLANES):
            start = block * 128 + plane * 32
            is_x = is_token
            if HAS_TAIL:
                is_x = is_x & (start + columns < in_features)[None, :]
            values = tl.trans(tl.load(x_rows + start, is_x, 0.0).to(dtype))
            group_scale = scales[plane * 32 // GROUP_SIZE].to(tl.float32)[:, None]
            if masks is None:
                codes = codes_of_planes(packed, plane, PLANES, dtype, ASSEMBLY).to(tl.float32)
                group_minimum = minimums[plane * 32 // GROUP_SIZE].to(tl.float32)[:, None]
            else:
                codes = load_sparse(words, masks, rows.to(tl.int64), start + columns, in_features, 4).to(
                    tl.float32
                )
                group_minimum = group_scale * -8
            weights = tl.fma(
                codes,
                tl.broadcast_to(group_scale, (BLOCK_N, WIDTH)),
                tl.broadcast_to(group_minimum, (BLOCK_N, WIDTH)),
            )
            total = tl.dot(weights.to(dtype), values, total, input_precision="ieee")
    store_tile(output, total, None, bias, features, tokens, num_tokens, out_features)


def int4_segments(
    x: GroupSums,
    weight: PackedInt4,
    bias: torch.Tensor | None,
    counters: torch.Tensor,
    tile: Tile | None = None,
    segments_per_program: int | None = None,
) -> torch.Tensor:
    """The form for few tokens, on a target of Triton: x [M, K] → [M, N]; its bits depend on neither argument.

    Args:
        bias: [N] float32.
        counters: From `new_counters`.
        segments_per_program: Instead of as many as fill the chip.
    """
    values = x.values
    target = target_of(values)
    assert target is not None
    (rows, in_features), out_features = values.shape, weight.out_features
    operation = "int4_matmul.segments" if weight.minimum is not None else "sparse24_int4_matmul.segments"
    tile = tile or select_tile(target, operation, rows)
    split = plan_split(target, tile, values, out_features, segments_per_program)
    output = torch.empty(rows, out_features, dtype=values.dtype, device=values.device)
    launch(
        _int4_segments_kernel,
        (triton.cdiv(out_features, tile["BLOCK_N"]), split.programs, triton.cdiv(rows, tile["BLOCK_M"])),
        {
            "x": values,
            "sums": x.sums,
            **weight.arguments(),
            "bias": bias,
            "output": output,
            "partials": split.partials,
            "counters": None if split.partials is None else counters,
            "num_tokens": rows,
            "segments_per_program": split.segments,
            "in_features": in_features,
            "out_features": out_features,
            "num_sums": x.sums.shape[1],
        },
        tile,
        GROUP_SIZE=weight.group_size,
        SEGMENT=SEGMENT,
        HAS_TAIL=in_features % tile["BLOCK_K"] != 0,
        ASSEMBLY=target.is_nvidia,
        INTERPRETED=target.arch == "interpreter",
    )
    return output


def int4_large(
    x: torch.Tensor, weight: PackedInt4, bias: torch.Tensor | None, tile: Tile | None = None
) -> torch.Tensor:
    """The form for many tokens, on a target of Triton: x [M, K] → [M, N]."""
    target = target_of(x)
    assert target is not None
    (rows, in_features), out_features = x.shape, weight.out_features
    operation = "int4_matmul.large" if weight.minimum is not None else "sparse24_int4_matmul.large"
    tile = tile or select_tile(target, operation, rows)
    output = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    launch(
        _int4_large_kernel,
        (triton.cdiv(rows, tile["BLOCK_M"]), triton.cdiv(out_features, tile["BLOCK_N"])),
        {
            "x": x,
            **weight.arguments(),
            "bias": bias,
            "output": output,
            "num_tokens": rows,
            "in_features": in_features,
            "out_features": out_features,
        },
        tile,
        GROUP_SIZE=weight.group_size,
        HAS_TAIL=in_features % BLOCK != 0,
        ASSEMBLY=target.is_nvidia,
        INTERPRETED=target.arch == "interpreter",
    )
    return output
