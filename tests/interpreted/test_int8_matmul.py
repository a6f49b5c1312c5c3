"""The int8 product: the Triton body equals its reference to the bit, whatever the tile, the split or the batch."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import launch
from engine.kernels.launch import Tile
from engine.kernels.matmul.int8 import MAX_IN_FEATURES, Int8Matmul, int8_matmul, reference
from engine.kernels.matmul.int8_triton import split_of
from engine.kernels.operands import Int8Format
from engine.kernels.quantize import quantize_per_token

FORMATS = [Int8Format(terms, group_size) for terms in (1, 2) for group_size in (None, 32, 64, 128)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_codes(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)


def tile(block_m: int, block_n: int, block_k: int = 32, tiles_m: int = 2) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "TILES_M": tiles_m}, 4, 1)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), [(1, 33, 96), (3, 16, 50), (17, 40, 130)])
@pytest.mark.parametrize("has_weight_groups", [False, True])
def test_equals_the_reference(
    num_tokens: int, rows: int, columns: int, format: Int8Format, has_weight_groups: bool
) -> None:
    if has_weight_groups and format.group_size is None:
        pytest.skip("a weight in groups needs activations in groups")
    groups = -(-columns // format.group_size) if has_weight_groups and format.group_size else None
    weight, bias = weight_codes(rows, columns), random(rows, seed=3)
    scale = random(*((rows,) if groups is None else (rows, groups)), seed=4).abs()
    x = random(num_tokens, columns, seed=1)
    expected = reference(quantize_per_token(x, format), weight, scale, bias, format.group_size)
    assert torch.equal(Int8Matmul(weight, scale, bias, format)(x), expected)


def test_returns_the_activations_dtype_and_takes_their_terms() -> None:
    weight, scale, x = weight_codes(16, 64), random(16).abs(), random(3, 64, seed=1).half()
    matmul = Int8Matmul(weight, scale)
    assert matmul.format == Int8Format()
    terms = quantize_per_token(x, Int8Format())
    expected = reference(terms, weight, scale)
    assert expected.dtype == torch.float16
    assert torch.equal(matmul(x), expected)
    assert torch.equal(matmul(terms), expected)


@pytest.mark.parametrize("format", [Int8Format(1), Int8Format(2), Int8Format(2, 32)], ids=str)
def test_rows_depend_neither_on_the_batch_nor_on_the_tile(format: Int8Format) -> None:
    weight, scale, x = weight_codes(70, 160), random(70).abs(), random(21, 160, seed=1)
    block_ks = (32,) if format.group_size else (32, 64)

    def product(rows: torch.Tensor, cut: Tile) -> torch.Tensor:
        return int8_matmul(
            quantize_per_token(rows, format), weight, scale, group_size=format.group_size, tile=cut
        )

    together = product(x, tile(16, 16))
    for block_k in block_ks:
        for cut in (tile(32, 16, block_k, 1), tile(16, 64, block_k, 8), tile(64, 32, block_k, 4)):
            assert torch.equal(product(x, cut), together)
    for row in (0, 7, 20):
        assert torch.equal(product(x[row : row + 1], tile(16, 32))[0], together[row])


@pytest.mark.parametrize("format", [Int8Format(1), Int8Format(2)], ids=str)
def test_sums_split_along_k_are_the_same(format: Int8Format) -> None:
    columns = 3 * 1024 + 160
    weight, scale, bias = weight_codes(40, columns), random(40).abs(), random(40, seed=3)
    x = quantize_per_token(random(3, columns, seed=1), format)
    cut = Tile({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256, "TILES_M": 1}, 4, 1, max_tokens=8)
    arrivals = torch.zeros(40, dtype=torch.int32)
    whole = int8_matmul(x, weight, scale, bias, tile=cut)
    assert split_of(launch.INTERPRETER, 3, columns) == 3
    for _ in range(2):
        assert torch.equal(int8_matmul(x, weight, scale, bias, arrivals=arrivals, tile=cut), whole)
        assert not arrivals.any()
    assert torch.equal(whole, reference(x, weight, scale, bias))


def test_sums_reach_their_bound_without_overflow() -> None:
    weight = torch.full((16, MAX_IN_FEATURES), -127, dtype=torch.int8)
    x = quantize_per_token(torch.full((1, MAX_IN_FEATURES), 127.0), Int8Format(1))
    y = int8_matmul(x, weight, torch.ones(16), tile=tile(16, 16, 8192))
    assert torch.all(y == float(-127 * 127 * MAX_IN_FEATURES) * x.scale)
    with pytest.raises(ValueError, match="overflow"):
        Int8Matmul(torch.empty(1, MAX_IN_FEATURES + 1, dtype=torch.int8), torch.ones(1))


def test_what_is_not_finite_stays_so_in_its_row() -> None:
    weight, scale, x = weight_codes(16, 64), random(16).abs(), random(3, 64, seed=1)
    x[1, 5] = torch.inf
    for format in (Int8Format(2), Int8Format(1, 32)):
        y = Int8Matmul(weight, scale, None, format)(x)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()
