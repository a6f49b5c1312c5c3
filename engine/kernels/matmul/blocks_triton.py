"""Float activations × weights on the grids of GGUF's types, in one form for any number of tokens.

    y[m, n] = Σ_g (Σ_{k in g} v[n, k] * x[m, k]) * scale[n, g] + (Σ_{k in g} x[m, k]) * minimum[n, g] + bias[n]

Whole numbers v are exact in x's type, and so are scales and minimums in float32, which are multiplied in registers
where they are steps of a block's: nothing is rounded but float32 sums. See `engine.kernels.matmul.segments_triton`
for their order: a token's bits depend neither on the other tokens nor on the tile. As in
`engine.kernels.matmul.int4_triton`, whose packed words those of four bits are, the product is computed transposed.
Codes of five and six bits stay bytes here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.embedding import multiplied
from engine.kernels.launch import Tile, launch, select_tile, target_of
from engine.kernels.matmul.group_sums_triton import group_sums
from engine.kernels.matmul.grouped_weight import GroupedWeight, GroupNumbers
from engine.kernels.matmul.int4 import BLOCK, pack_words
from engine.kernels.matmul.int4_triton import codes_of_planes
from engine.kernels.matmul.segments_triton import (
    SEGMENT,
    finish_tile,
    load_groups,
    new_counters,
    partial_pointers,
    plan_split,
)
from engine.kernels.operands import Activations, Format, GroupSums, SumsFormat


@triton.jit(do_not_specialize=["num_tokens", "segments_per_program"])
def _block_kernel(
    x,
    sums,
    codes,
    table,
    scale,
    scale_steps,
    minimum,
    minimum_steps,
    bias,
    output,
    partials,
    counters,
    num_tokens,
    segments_per_program,
    in_features,
    out_features,
    num_sums,
    IS_PACKED: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUMBER_BLOCKS: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    STEPS: tl.constexpr = SEGMENT // 128
    GROUPS: tl.constexpr = 128 // GROUP_SIZE
    # bf16 products are wrong in the interpreter.
    dtype: tl.constexpr = tl.float32 if INTERPRETED else x.dtype.element_ty

    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = (tokens < num_tokens)[:, None]
    # Rows past the end read the last one's weights; their products are not stored.
    rows = tl.minimum(features, out_features - 1)
    sum_rows = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
    columns = tl.arange(0, GROUP_SIZE)
    x_rows = x + tokens.to(tl.int64)[:, None] * in_features + columns[None, :]
    num_blocks = tl.cdiv(in_features, 128)
    num_groups = num_blocks * GROUPS
    num_numbers = tl.cdiv(num_blocks, NUMBER_BLOCKS)
    if IS_PACKED:
        code_rows = codes + rows[:, None] * 32 + tl.arange(0, 32)[None, :]
        block_stride = tl.cast(out_features, tl.int64) * 32
    else:
        code_rows = codes + rows.to(tl.int64)[:, None] * (num_blocks * 128) + columns[None, :]
        block_stride = tl.cast(128, tl.int64)
    first = tl.program_id(1) * segments_per_program * STEPS
    end = tl.minimum(first + segments_per_program * STEPS, num_blocks)

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    segment_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Read a step ahead: see `load_groups`.
    scales = _load_numbers(
        scale, scale_steps, first, rows, out_features, num_groups, num_numbers, GROUPS, NUMBER_BLOCKS
    )
    if minimum is not None:
        minimums = _load_numbers(
            minimum,
            minimum_steps,
            first,
            rows,
            out_features,
            num_groups,
            num_numbers,
            GROUPS,
            NUMBER_BLOCKS,
        )
        group_totals = load_groups(sums, first, sum_rows, num_sums, 1, num_sums, GROUPS)
    for block in range(first, end):
        next_scales = _load_numbers(
            scale,
            scale_steps,
            block + 1,
            rows,
            out_features,
            num_groups,
            num_numbers,
            GROUPS,
            NUMBER_BLOCKS,
        )
        if minimum is not None:
            next_minimums = _load_numbers(
                minimum,
                minimum_steps,
                block + 1,
                rows,
                out_features,
                num_groups,
                num_numbers,
                GROUPS,
                NUMBER_BLOCKS,
            )
            next_totals = load_groups(sums, block + 1, sum_rows, num_sums, 1, num_sums, GROUPS)
        if IS_PACKED:
            packed = tl.load(code_rows + block * block_stride)
        for group in tl.static_range(GROUPS):
            start = block * 128 + group * GROUP_SIZE
            is_x = is_token
            if HAS_TAIL:
                is_x = is_x & (start + columns < in_features)[None, :]
            values = tl.trans(tl.load(x_rows + start, is_x, 0.0).to(dtype))
            if table is not None:
                weights = tl.load(table + ((packed >> (4 * group)) & 15)).to(dtype)
            elif IS_PACKED:
                weights = codes_of_planes(packed, group, 1, dtype, ASSEMBLY) - OFFSET
            else:
                weights = tl.load(code_rows + block * block_stride + group * GROUP_SIZE).to(dtype) - OFFSET
            product = tl.dot(weights.to(dtype), values, input_precision="ieee")
            group_scale = tl.broadcast_to(scales[group][:, None], (BLOCK_N, BLOCK_M))
            segment_total = tl.fma(product, group_scale, segment_total)
            if minimum is not None:
                least = tl.broadcast_to(minimums[group][:, None], (BLOCK_N, BLOCK_M))
                group_total = tl.broadcast_to(group_totals[group][None, :], (BLOCK_N, BLOCK_M))
                segment_total = tl.fma(least, group_total, segment_total)
        scales = next_scales
        if minimum is not None:
            minimums = next_minimums
            group_totals = next_totals
        if (block + 1) % STEPS == 0 or block + 1 == end:
            if partials is not None:
                tl.store(partial_pointers(partials, block // STEPS, BLOCK_N, BLOCK_M), segment_total)
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


@triton.jit
def _load_numbers(
    values,
    steps,
    block,
    rows,
    out_features,
    num_groups,
    num_numbers,
    GROUPS: tl.constexpr,
    NUMBER_BLOCKS: tl.constexpr,
):
    """A number [BLOCK_N] float32 for each group of a block of 128."""
    if steps is None:
        loaded = load_groups(values, block, rows, 1, out_features, num_groups, GROUPS)
        numbers = ()
        for i in tl.static_range(GROUPS):
            numbers = numbers + (loaded[i].to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    else:
        loaded = load_groups(steps, block, rows, 1, out_features, num_groups, GROUPS)
        place = tl.minimum(block // NUMBER_BLOCKS, num_numbers - 1)
        of_block = tl.load(values + place * out_features + rows).to(tl.float32)
        numbers = ()
        for i in tl.static_range(GROUPS):
            numbers = numbers + (loaded[i].to(tl.float32) * of_block,)  # type: ignore[assignment]  # noqa: RUF005
    return numbers


class BlockMatmul:
    """The product of float activations with one weight, on a target of Triton.

    Args:
        weight: In groups of 32 or, without minimums and not packed, of 16.
        bias: [N] float32, added to the float32 sums.

    Attributes:
        format: What the product's activations are wanted as.
    """

    def __init__(self, weight: GroupedWeight, bias: torch.Tensor | None) -> None:
        assert weight.scale is not None
        assert weight.group_size == 32 or (weight.group_size == 16 and weight.minimum is None)
        codes = weight.codes
        self.bias, self.group_size, self.offset = bias, weight.group_size, weight.offset
        self.is_packed = weight.bits == 4
        self.out_features, self.in_features = codes.shape[0], weight.in_features
        padding = -weight.in_features % BLOCK
        # The offset stands for zero where K is padded, though nothing but zeros is multiplied with it.
        self.codes = pack_words(codes) if self.is_packed else F.pad(codes, (0, padding)).contiguous()
        self.table = None if weight.values is None else weight.values.to(codes.device)
        self.blocks_a_number = max(1, weight.block_size // BLOCK)
        groups = (weight.in_features + padding) // weight.group_size
        self.scale = _by_groups(weight.scale, groups)
        self.minimum = None if weight.minimum is None else _by_groups(weight.minimum, groups)
        self.counters = new_counters(codes.shape[0], codes.device)
        self.format: Format = None if weight.minimum is None else SumsFormat()

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] float → [M, N] of x's dtype."""
        assert isinstance(x, torch.Tensor | GroupSums)
        if self.minimum is None:
            return block_matmul(x.values if isinstance(x, GroupSums) else x, None, self)
        given = x if isinstance(x, GroupSums) else group_sums(x)
        return block_matmul(given.values, given.sums, self)

    def rows(self, token_ids: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
        """See `engine.quant.scheme.TableMatmul`."""
        return multiplied(block_rows(token_ids, self, dtype), factor)


def _by_groups(numbers: GroupNumbers, groups: int) -> GroupNumbers:
    """As the kernel reads them, [groups, N]; zeros where K is padded."""
    if numbers.steps is None:
        padded = F.pad(numbers.values, (0, groups - numbers.values.shape[1]))
        return GroupNumbers(padded.t().contiguous())
    steps = F.pad(numbers.steps, (0, groups - numbers.steps.shape[1]))
    return GroupNumbers(numbers.values.t().contiguous(), steps.t().contiguous())


def block_matmul(
    x: torch.Tensor,
    sums: torch.Tensor | None,
    weight: BlockMatmul,
    tile: Tile | None = None,
    segments_per_program: int | None = None,
) -> torch.Tensor:
    """`BlockMatmul`: x [M, K] → [M, N]; its bits depend on neither of the last two arguments.

    Args:
        sums: [M, ceil(K / 32)] float32 of x, where the weight has minimums.
        segments_per_program: Instead of as many as fill the chip.
    """
    target = target_of(x)
    assert target is not None
    (num_tokens, in_features), out_features = x.shape, weight.out_features
    tile = tile or select_tile(target, "block_matmul", num_tokens)
    split = plan_split(target, tile, x, out_features, segments_per_program)
    output = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    minimum = weight.minimum
    launch(
        _block_kernel,
        (
            triton.cdiv(out_features, tile["BLOCK_N"]),
            split.programs,
            triton.cdiv(num_tokens, tile["BLOCK_M"]),
        ),
        {
            "x": x,
            "sums": sums,
            "codes": weight.codes,
            "table": weight.table,
            "scale": weight.scale.values,
            "scale_steps": weight.scale.steps,
            "minimum": None if minimum is None else minimum.values,
            "minimum_steps": None if minimum is None else minimum.steps,
            "bias": weight.bias,
            "output": output,
            "partials": split.partials,
            "counters": None if split.partials is None else weight.counters,
            "num_tokens": num_tokens,
            "segments_per_program": split.segments,
            "in_features": in_features,
            "out_features": out_features,
            "num_sums": 1 if sums is None else sums.shape[1],
        },
        tile,
        IS_PACKED=weight.is_packed,
        OFFSET=weight.offset,
        GROUP_SIZE=weight.group_size,
        NUMBER_BLOCKS=weight.blocks_a_number,
        SEGMENT=SEGMENT,
        HAS_TAIL=in_features % BLOCK != 0,
        ASSEMBLY=target.is_nvidia,
        INTERPRETED=target.arch == "interpreter",
    )
    return output


@triton.jit
def _block_rows_kernel(
    token_ids,
    codes,
    table,
    scale,
    scale_steps,
    minimum,
    minimum_steps,
    output,
    in_features,
    out_features,
    IS_PACKED: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUMBER_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < in_features
    row = tl.load(token_ids + token).to(tl.int64)
    block = columns // 128
    if IS_PACKED:
        words = codes + (block.to(tl.int64) * out_features + row) * 32 + columns % 32
        code = (tl.load(words, is_column, 0).to(tl.int32) >> (columns % 128 // 32 * 4)) & 15
    else:
        code = tl.load(codes + row * (tl.cdiv(in_features, 128) * 128) + columns, is_column, 0).to(tl.int32)
    values = (code - OFFSET).to(tl.float32)
    if table is not None:
        values = tl.load(table + code).to(tl.float32)
    groups = (columns // GROUP_SIZE).to(tl.int64) * out_features + row
    numbers = (block // NUMBER_BLOCKS).to(tl.int64) * out_features + row
    values *= _load_number(scale, scale_steps, groups, numbers, is_column)
    if minimum is not None:
        values += _load_number(minimum, minimum_steps, groups, numbers, is_column)
    tl.store(output + token * in_features + columns, values.to(output.dtype.element_ty), is_column)


@triton.jit
def _load_number(values, steps, groups, numbers, is_column):
    if steps is None:
        loaded = tl.load(values + groups, is_column, 0.0).to(tl.float32)
    else:
        loaded = tl.load(steps + groups, is_column, 0).to(tl.float32)
        loaded *= tl.load(values + numbers, is_column, 0.0).to(tl.float32)
    return loaded


def block_rows(
    token_ids: torch.Tensor, weight: BlockMatmul, dtype: torch.dtype, tile: Tile | None = None
) -> torch.Tensor:
    """Rows of a weight, in float32 until they are rounded to `dtype`: token_ids [T] → [T, K]."""
    target = target_of(weight.codes)
    assert target is not None
    num_tokens, minimum = token_ids.shape[0], weight.minimum
    tile = tile or select_tile(target, "embedding", num_tokens)
    y = torch.empty(num_tokens, weight.in_features, dtype=dtype, device=weight.codes.device)
    launch(
        _block_rows_kernel,
        (num_tokens, triton.cdiv(weight.in_features, tile["BLOCK"])),
        {
            "token_ids": token_ids,
            "codes": weight.codes,
            "table": weight.table,
            "scale": weight.scale.values,
            "scale_steps": weight.scale.steps,
            "minimum": None if minimum is None else minimum.values,
            "minimum_steps": None if minimum is None else minimum.steps,
            "output": y,
            "in_features": weight.in_features,
            "out_features": weight.out_features,
        },
        tile,
        IS_PACKED=weight.is_packed,
        OFFSET=weight.offset,
        GROUP_SIZE=weight.group_size,
        NUMBER_BLOCKS=weight.blocks_a_number,
    )
    return y
