"""The Triton bodies of the int4 product against float64, and what their bits must not depend on."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.launch import Tile
from engine.kernels.matmul.group_sums_triton import group_sums
from engine.kernels.matmul.group_sums_triton import reference as reference_sums
from engine.kernels.matmul.int4 import Int4Matmul, dequantize, pack
from engine.kernels.matmul.int4_triton import int4_large, int4_segments
from engine.kernels.matmul.segments_triton import new_counters
from engine.kernels.operands import GroupSums

SHAPES = [(1, 16, 128), (3, 40, 96), (17, 33, 300)]
"""(M, N, K): with tails of every size."""


def small_tile(block_m: int, block_n: int, block_k: int = 128) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}, 4, 1, max_tokens=128)


def random_weight(
    rows: int, columns: int, group_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 256, (rows, (columns + 1) // 2), dtype=torch.uint8, generator=generator)
    shape = (rows, -(-columns // group_size))
    scale = torch.rand(shape, generator=generator).mul(0.1).half()
    return codes, scale, torch.randn(shape, generator=generator).half()


def coarse_weight(
    rows: int, columns: int, group_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales and minimums of few bits: with small integers for activations every sum is exact in float32."""
    codes, scale, _ = random_weight(rows, columns, group_size, generator)
    scale = torch.randint(1, 4, scale.shape, generator=generator).div(4).half()
    return codes, scale, torch.randint(-32, 33, scale.shape, generator=generator).div(4).half()


def integers(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-4, 5, (rows, columns), generator=generator).float()


def with_sums(x: torch.Tensor) -> GroupSums:
    return GroupSums(x, reference_sums(x))


def exact(
    x: torch.Tensor, weight: tuple[torch.Tensor, torch.Tensor, torch.Tensor], group_size: int
) -> torch.Tensor:
    return x.double() @ dequantize(*weight, group_size, x.shape[1]).double().t()


def rounding(dtype: torch.dtype) -> float:
    """The most that rounding a value to `dtype` changes it by; the interpreter cuts bfloat16 off."""
    return torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)


@pytest.mark.parametrize("columns", [256, 96, 201])
def test_words_hold_the_codes(columns: int) -> None:
    codes, scale, minimum = random_weight(5, columns, 32, torch.Generator().manual_seed(0))
    packed = pack(codes, scale, minimum, 32)
    assert packed.words.shape == (-(-columns // 128), 5, 32)
    for k in range(columns):
        word = packed.words[k // 128, :, k % 32].int()
        code = codes[:, k // 2].int() >> (4 * (k % 2)) & 15
        assert torch.equal(word >> (4 * (k % 128 // 32)) & 15, code)
    groups = scale.shape[1]
    assert torch.equal(packed.scale[:groups], scale.t())
    assert torch.equal(packed.minimum[:groups], minimum.t())
    assert not packed.scale[groups:].any()
    assert not packed.minimum[groups:].any()


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (3, 1100), (17, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_group_sums(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = group_sums(x).sums
    # A tree of five additions, each within 2^-24 of its result.
    torch.testing.assert_close(sums, reference_sums(x.double()), rtol=0, atol=5 * 2**-24 * 32 * 5)
    tile = Tile({"BLOCK_M": 2, "BLOCK_K": 64}, 4, 1)
    assert torch.equal(group_sums(x, tile).sums, sums)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), [*SHAPES, (3, 20, 1300)])
def test_segments_are_exact_where_sums_are(group_size: int, num_tokens: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    weight, x = coarse_weight(rows, columns, group_size, generator), integers(num_tokens, columns, generator)
    packed, counters = pack(*weight, group_size), new_counters(rows, x.device)
    expected = exact(x, weight, group_size).float()
    for tile, segments_per_program in ((small_tile(16, 16), 2), (small_tile(32, 64, 256), 1)):
        y = int4_segments(with_sums(x), packed, None, counters, tile, segments_per_program)
        assert torch.equal(y, expected)
        assert not counters.any()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), SHAPES)
def test_segments_within_float32_rounding(
    group_size: int, dtype: torch.dtype, num_tokens: int, rows: int, columns: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = random_weight(rows, columns, group_size, generator)
    x = torch.randn(num_tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator)
    y = int4_segments(with_sums(x), pack(*weight, group_size), bias, new_counters(rows, x.device))
    codes, scale, minimum = weight
    # Codes and minimums are summed apart: K products of each, and what joins them, round to 2^-24 of at most
    # the sum of magnitudes; the result rounds once to its type.
    magnitudes = x.double().abs() @ dequantize(codes, scale, minimum.abs(), group_size, columns).double().t()
    bound = (columns + 100) * 2**-24 * (magnitudes + bias.abs())
    expected = exact(x, weight, group_size) + bias
    bound += rounding(dtype) * (expected.abs() + bound)
    assert y.dtype == dtype
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), [(3, 40, 96), (33, 33, 300)])
def test_large_form(group_size: int, dtype: torch.dtype, num_tokens: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = random_weight(rows, columns, group_size, generator)
    x = torch.randn(num_tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator)
    y = int4_large(x, pack(*weight, group_size), bias)
    expected = exact(x, weight, group_size) + bias
    magnitudes = x.double().abs() @ dequantize(*weight, group_size, columns).double().abs().t() + bias.abs()
    # Each weight is rounded to x's type, then K products and the result as above.
    bound = (rounding(dtype) + (columns + 10) * 2**-24) * magnitudes
    bound += rounding(dtype) * (expected.abs() + bound)
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_shared_segments_are_added_in_order() -> None:
    """Values whose sum depends on the order: one program's and several programs' bits are equal."""
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(32, 3100, 128, generator)
    x = with_sums(torch.randn(2, 3100, generator=generator) * torch.logspace(3, -3, 3100))
    packed, counters, tile = pack(*weight, 128), new_counters(32, x.values.device), small_tile(16, 32, 256)
    together = int4_segments(x, packed, None, counters, tile, segments_per_program=4)
    for segments_per_program in (1, 2, 3):
        assert torch.equal(int4_segments(x, packed, None, counters, tile, segments_per_program), together)


def test_a_row_alone_and_in_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = coarse_weight(32, 200, 64, generator), integers(20, 200, generator)
    matmul = Int4Matmul(*weight, 64, batch_invariant=True)
    together = matmul(x)
    for row in (0, 19):
        assert torch.equal(matmul(x[row : row + 1])[0], together[row])
    x[5] = torch.nan
    assert torch.equal(matmul(x)[:5], together[:5])


def test_sums_are_taken_as_they_come() -> None:
    """Sums of zero take the minimums out of the product."""
    generator = torch.Generator().manual_seed(0)
    codes, scale, minimum = coarse_weight(16, 128, 32, generator)
    x = integers(3, 128, generator)
    matmul = Int4Matmul(codes, scale, minimum, 32)
    without = Int4Matmul(codes, scale, torch.zeros_like(minimum), 32)(x)
    assert torch.equal(matmul(GroupSums(x, torch.zeros(3, 4))), without)
    assert not torch.equal(matmul(x), without)
