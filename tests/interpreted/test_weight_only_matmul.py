"""The Triton body of the weight-only product against float64, and what its bits must not depend on."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.launch import Tile
from engine.kernels.matmul.segments_triton import new_counters
from engine.kernels.matmul.weight_only import GroupSize, WeightOnlyMatmul, dequantize
from engine.kernels.matmul.weight_only_triton import weight_only_matmul
from engine.kernels.operands import GroupSums

GROUPS: list[GroupSize] = [None, 32, 64, 128]
SHAPES = [(1, 16, 128), (3, 40, 100), (17, 33, 1300)]
"""(M, N, K): with tails of every size; one segment and two."""


def small_tile(block_m: int, block_n: int, block_k: int) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}, 4, 1, max_tokens=128)


def scale_shape(rows: int, columns: int, group_size: GroupSize) -> tuple[int, ...]:
    return (rows,) if group_size is None else (rows, -(-columns // group_size))


def random_weight(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)


def integers(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-4, 5, (rows, columns), generator=generator).float()


def rounding(dtype: torch.dtype) -> float:
    """The most that rounding a value to `dtype` changes it by; the interpreter cuts bfloat16 off."""
    return torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), SHAPES)
def test_exact_where_sums_are(group_size: GroupSize, num_tokens: int, rows: int, columns: int) -> None:
    """Small integers and scales of few bits: every sum is exact, whatever the tile and the number of programs."""
    generator = torch.Generator().manual_seed(num_tokens)
    weight, x = random_weight(rows, columns, generator), integers(num_tokens, columns, generator)
    shape = scale_shape(rows, columns, group_size)
    scale = torch.randint(1, 4, shape, generator=generator).div(4)
    expected = (x.double() @ dequantize(weight, scale, group_size).double().t()).float()
    counters = new_counters(rows, x.device)
    for tile, segments_per_program in ((small_tile(16, 16, 128), 2), (small_tile(32, 64, 256), 1)):
        y = weight_only_matmul(x, weight, scale, group_size, None, counters, tile, segments_per_program)
        assert torch.equal(y, expected)
        assert not counters.any()


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_int8_within_float32_rounding(group_size: GroupSize, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    num_tokens, rows, columns = 17, 33, 300
    weight = random_weight(rows, columns, generator)
    scale = torch.rand(scale_shape(rows, columns, group_size), generator=generator) * 0.01
    x = torch.randn(num_tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator)
    y = WeightOnlyMatmul(weight, scale, group_size, bias)(x)
    assert y.dtype == dtype
    check(y, x, dequantize(weight, scale, group_size), bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), SHAPES)
def test_floats_within_float32_rounding(dtype: torch.dtype, num_tokens: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    x = torch.randn(num_tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator)
    check(WeightOnlyMatmul(weight, bias=bias)(GroupSums(x, torch.empty(0))), x, weight, bias)


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    expected = x.double() @ weight.double().t() + bias
    # K products and what joins them each round to 2^-24 of at most the sum of magnitudes; the result rounds
    # once to its type.
    magnitudes = x.double().abs() @ weight.double().abs().t() + bias.abs()
    bound = (x.shape[1] + 10) * 2**-24 * magnitudes
    bound += rounding(y.dtype) * (expected.abs() + bound)
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("group_size", [None, 128])
def test_shared_segments_are_added_in_order(group_size: GroupSize) -> None:
    """Values whose sum depends on the order: one program's and several programs' bits are equal."""
    generator = torch.Generator().manual_seed(0)
    weight = random_weight(32, 3100, generator)
    scale = torch.rand(scale_shape(32, 3100, group_size), generator=generator)
    x = torch.randn(2, 3100, generator=generator) * torch.logspace(3, -3, 3100)
    counters, tile = new_counters(32, x.device), small_tile(16, 32, 256)
    together = weight_only_matmul(x, weight, scale, group_size, None, counters, tile, 4)
    for segments_per_program in (1, 2, 3):
        shared = weight_only_matmul(x, weight, scale, group_size, None, counters, tile, segments_per_program)
        assert torch.equal(shared, together)


def test_a_row_alone_and_in_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    matmul = WeightOnlyMatmul(random_weight(48, 200, generator), torch.full((48,), 0.5))
    x = integers(40, 200, generator)
    together = matmul(x)
    for row in (0, 16, 39):
        assert torch.equal(matmul(x[row : row + 1])[0], together[row])
    x[5] = torch.nan
    assert torch.equal(matmul(x)[:5], together[:5])
