"""`engine.kernels.matmul.codebook`'s product on a target of Triton, in one form for any number of tokens.

Values are rounded to the activations' type and looked up in memory; a scale multiplies float32 sums. See
`engine.kernels.matmul.segments_triton` for their order: a token's bits depend neither on the other tokens nor on the
tile. As in `engine.kernels.matmul.int4_triton`, whose packed words these are, the product is computed transposed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.launch import Tile, launch, select_tile, target_of
from engine.kernels.matmul.codebook import SCALE_SIZE
from engine.kernels.matmul.int4 import BLOCK, pack_words
from engine.kernels.matmul.segments_triton import (
    SEGMENT,
    finish_tile,
    load_groups,
    new_counters,
    partial_pointers,
    plan_split,
)
from engine.kernels.operands import Activations, Format, GroupSums


@triton.jit
def _look_up(tables, words, plane: tl.constexpr, dtype: tl.constexpr):
    """Words [BLOCK_N, 32] → values [BLOCK_N, 64] of two planes; tables: pointers to each row's [BLOCK_N, 1]."""
    first = tl.load(tables + ((words >> (4 * plane)) & 15)).to(dtype)
    second = tl.load(tables + ((words >> (4 * plane + 4)) & 15)).to(dtype)
    pair = tl.permute(tl.join(first, second), (0, 2, 1))
    return tl.reshape(pair, (words.shape[0], 2 * words.shape[1]))


@triton.jit(do_not_specialize=["num_tokens", "segments_per_program"])
def _codebook_kernel(
    x,
    words,
    codebook,
    scale,
    bias,
    output,
    partials,
    counters,
    num_tokens,
    segments_per_program,
    in_features,
    out_features,
    IS_SHARED: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    STEPS: tl.constexpr = SEGMENT // BLOCK_K
    SCALES: tl.constexpr = BLOCK_K // 64
    # bf16 products are wrong in the interpreter.
    dtype: tl.constexpr = tl.float32 if INTERPRETED else x.dtype.element_ty

    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = (tokens < num_tokens)[:, None]
    # Rows past the end read the last one's weights; their products are not stored.
    rows = tl.minimum(features, out_features - 1)
    columns = tl.arange(0, 64)
    x_rows = x + tokens.to(tl.int64)[:, None] * in_features + columns[None, :]
    word_rows = words + rows[:, None] * 32 + tl.arange(0, 32)[None, :]
    tables = codebook + (rows * 0 if IS_SHARED else rows * 16)[:, None]
    block_stride = tl.cast(out_features, tl.int64) * 32
    num_blocks = tl.cdiv(in_features, 128)
    num_scales = num_blocks * 2
    first = tl.program_id(1) * segments_per_program
    end = tl.minimum((first + segments_per_program) * STEPS, tl.cdiv(in_features, BLOCK_K))

    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    segment_total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if scale is not None:
        scales = load_groups(scale, first * STEPS, rows, 1, out_features, num_scales, SCALES)
    for step in range(first * STEPS, end):
        if scale is not None:
            next_scales = load_groups(scale, step + 1, rows, 1, out_features, num_scales, SCALES)
        for part in tl.static_range(BLOCK_K // 128):
            block = step * (BLOCK_K // 128) + part
            packed = tl.load(word_rows + tl.minimum(block, num_blocks - 1) * block_stride)
            for plane in tl.static_range(0, 4, 2):
                start = block * 128 + plane * 32
                is_x = is_token
                if HAS_TAIL:
                    is_x = is_x & (start + columns < in_features)[None, :]
                values = tl.trans(tl.load(x_rows + start, is_x, 0.0).to(dtype))
                weights = _look_up(tables, packed, plane, dtype)
                if scale is None:
                    segment_total = tl.dot(weights, values, segment_total, input_precision="ieee")
                else:
                    product = tl.dot(weights, values, input_precision="ieee")
                    own_scale = tl.broadcast_to(scales[part * 2 + plane // 2][:, None], (BLOCK_N, BLOCK_M))
                    segment_total = tl.fma(product, own_scale, segment_total)
        if scale is not None:
            scales = next_scales
        if (step + 1) % STEPS == 0 or step + 1 == end:
            if partials is not None:
                tl.store(partial_pointers(partials, step // STEPS, BLOCK_N, BLOCK_M), segment_total)
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


class CodebookMatmul:
    """The product of float activations with one weight, on a target of Triton.

    Args:
        codes: [N, ceil(K / 2)] uint8, element k in byte k // 2, the even ones in the low nibble.
        codebook: [N or 1, 16] float; its values are rounded to the activations' type.
        scale: [N, ceil(K / 64)] float32, or None.
        bias: [N] float32, added to the float32 sums.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        codebook: torch.Tensor,
        scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self.words, self.codebook, self.bias = pack_words(codes), codebook, bias
        self._rounded = codebook
        self.scale: torch.Tensor | None = None
        if scale is not None:
            padding = len(self.words) * (BLOCK // SCALE_SIZE) - scale.shape[1]
            self.scale = F.pad(scale, (0, padding)).t().contiguous()
        self.counters = new_counters(codes.shape[0], codes.device)
        self.format: Format = None

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] float → [M, N] of x's dtype."""
        assert isinstance(x, torch.Tensor | GroupSums)
        return codebook_matmul(x.values if isinstance(x, GroupSums) else x, self)

    def table(self, dtype: torch.dtype) -> torch.Tensor:
        """The codebook in the activations' type: rounded when that is first known, not for every product."""
        if self._rounded.dtype != dtype:
            self._rounded = self.codebook.to(dtype)
        return self._rounded


def codebook_matmul(
    x: torch.Tensor,
    weight: CodebookMatmul,
    tile: Tile | None = None,
    segments_per_program: int | None = None,
) -> torch.Tensor:
    """`CodebookMatmul`: x [M, K] → [M, N]; its bits depend on neither of the last two arguments.

    Args:
        segments_per_program: Instead of as many as fill the chip.
    """
    target = target_of(x)
    assert target is not None
    (num_tokens, in_features), out_features = x.shape, weight.words.shape[1]
    tile = tile or select_tile(target, "codebook_matmul", num_tokens)
    split = plan_split(target, tile, x, out_features, segments_per_program)
    output = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    launch(
        _codebook_kernel,
        (
            triton.cdiv(out_features, tile["BLOCK_N"]),
            split.programs,
            triton.cdiv(num_tokens, tile["BLOCK_M"]),
        ),
        {
            "x": x,
            "words": weight.words,
            "codebook": weight.table(x.dtype),
            "scale": weight.scale,
            "bias": weight.bias,
            "output": output,
            "partials": split.partials,
            "counters": None if split.partials is None else weight.counters,
            "num_tokens": num_tokens,
            "segments_per_program": split.segments,
            "in_features": in_features,
            "out_features": out_features,
        },
        tile,
        IS_SHARED=len(weight.codebook) == 1,
        SEGMENT=SEGMENT,
        HAS_TAIL=in_features % tile["BLOCK_K"] != 0,
        INTERPRETED=target.arch == "interpreter",
    )
    return output
