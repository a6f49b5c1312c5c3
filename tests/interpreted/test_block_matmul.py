"""The Triton body of products with weights of GGUF's types against float64, and what its bits must not depend on."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.launch import Tile
from engine.kernels.matmul.blocks_triton import BlockMatmul, block_matmul
from engine.kernels.matmul.group_sums_triton import group_sums
from engine.quant.block_weight import BLOCK_TYPES
from engine.quant.blocks import Blocks
from tests.helpers.block_weights import random_block_weight

SHAPES = [(1, 16, 256), (17, 33, 1280)]
"""(M, N, K): one segment and two."""

KINDS = ["q4_1", "q4_k", "q6_k", "iq4_xs", "q5_0"]
"""Packed and not, with and without minimums, steps, an offset and a table."""


def small_tile(block_m: int, block_n: int) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n}, 4, 1, max_tokens=128)


def sums_of(x: torch.Tensor, matmul: BlockMatmul) -> torch.Tensor | None:
    return None if matmul.minimum is None else group_sums(x).sums


@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), SHAPES)
def test_exact_where_sums_are(kind: str, num_tokens: int, rows: int, columns: int) -> None:
    """Small integers and scales of few bits: every sum is exact, whatever the tile and the number of programs."""
    weight = random_block_weight(kind, rows, columns, is_simple=True)
    x = torch.randint(-4, 5, (num_tokens, columns)).float()
    expected = (x.double() @ weight.dequantize().double().t()).float()
    matmul = BlockMatmul(weight.grouped, None)
    assert torch.equal(matmul(x), expected)
    for tile, segments_per_program in ((small_tile(16, 16), 2), (small_tile(32, 64), 1)):
        assert torch.equal(block_matmul(x, sums_of(x, matmul), matmul, tile, segments_per_program), expected)
        assert not matmul.counters.any()


@pytest.mark.parametrize("columns", [32, 96, 352])
def test_columns_that_fill_no_block(columns: int) -> None:
    for kind in ("q4_1", "q5_1", "iq4_nl"):
        weight = random_block_weight(kind, 20, columns, is_simple=True)
        x = torch.randint(-4, 5, (3, columns)).float()
        assert torch.equal(BlockMatmul(weight.grouped, None)(x), x @ weight.dequantize().t())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_within_float32_rounding(kind: str, dtype: torch.dtype) -> None:
    weight, bias = random_block_weight(kind, 33, 512), torch.randn(33)
    x = torch.randn(17, 512).to(dtype)
    stored = Blocks(kind).quantize(weight)
    matmul = Blocks(kind).bind(stored, bias)
    assert isinstance(matmul, BlockMatmul)
    y, values = matmul(x), weight.dequantize().double()
    assert y.dtype == dtype
    expected = x.double() @ values.t() + bias
    # K products of codes, as many of minimums, and what joins them each round to 2^-24 of at most the sum of
    # magnitudes; the result rounds once to its type, which the interpreter does by cutting bfloat16 off.
    scale = weight.grouped.scale
    assert scale is not None
    largest = weight.grouped.integers().abs() * scale.expand().abs().repeat_interleave(
        weight.grouped.group_size, dim=1
    )
    magnitudes = x.double().abs() @ (largest.double() + (values - largest).abs()).t() + bias.abs()
    bound = (2 * 512 + 10) * 2**-24 * magnitudes
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    bound += rounding * (expected.abs() + bound)
    assert torch.all((y.double() - expected).abs() <= bound)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_segments_are_added_in_order(kind: str) -> None:
    """Values whose sum depends on the order: one program's and several programs' bits are equal."""
    matmul = BlockMatmul(random_block_weight(kind, 32, 3072).grouped, None)
    x = torch.randn(2, 3072) * torch.logspace(3, -3, 3072)
    together = block_matmul(x, sums_of(x, matmul), matmul, small_tile(16, 32), 4)
    for segments_per_program in (1, 2):
        shared = block_matmul(x, sums_of(x, matmul), matmul, small_tile(16, 32), segments_per_program)
        assert torch.equal(shared, together)


def test_a_row_alone_and_in_a_batch() -> None:
    matmul = BlockMatmul(random_block_weight("q4_k", 48, 256, is_simple=True).grouped, None)
    x = torch.randint(-4, 5, (40, 256)).float()
    together = matmul(x)
    for row in (0, 16, 39):
        assert torch.equal(matmul(x[row : row + 1])[0], together[row])
    x[5] = torch.nan
    assert torch.equal(matmul(x)[:5], together[:5])
