"""The CPU's products in C: equal to torch's operators to the bit, alone and together, up to the ends of the types."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import cpu
from engine.kernels.matmul.cpu_int8 import (
    CodebookGrid,
    CpuFloatMatmul,
    CpuInt8Matmul,
    CpuWeight,
    codebook_grid,
    pack_codebook,
    reference,
)
from engine.kernels.matmul.int8 import MAX_IN_FEATURES
from engine.kernels.nibbles import pack_nibbles
from engine.kernels.operands import SparseInt8Format
from engine.kernels.quantize import HIGH_STEPS, quantize_sparse, sparse_reference
from engine.quant.cpu_formats import CPU_ACTIVATIONS

SHAPES = [
    (1, 1),
    (3, 2),
    (16, 16),
    (17, 33),
    (48, 64),
    (70, 100),
    (129, 576),
    (64, 128),
    (8, 1536),
    (200, 50),
]
"""Output and input features: whole panels, groups and lines, and parts of them."""

TOKENS = [1, 2, 3, 4, 5, 6, 7, 13, 15, 16, 17, 31, 32, 33, 47, 100, 191, 192, 193, 200]
"""Beside the sizes of tiles (4, 6, 16, 32) and of chunks (192)."""

FORMATS = [CPU_ACTIVATIONS, SparseInt8Format(0.0)]
"""The engine's, and one under which nearly every element needs a high term."""


@pytest.fixture(autouse=True)
def compiler() -> None:
    if cpu.library() is None:
        pytest.skip("there is no C compiler on this machine")


def activations(num_tokens: int, in_features: int) -> torch.Tensor:
    """Random tokens, and among the first of them every kind that is not."""
    x = torch.randn(num_tokens, in_features) * 3
    x[0, 0] = 1000.0
    if num_tokens < 13:
        return x
    x[1] = 0.0
    x[2] = 0.7
    x[3, -1] = 1e6
    x[4, in_features // 2] = torch.nan
    x[5, -1] = torch.inf
    x[6, 0] = -torch.inf
    x[7] *= 1e-30
    x[8] *= 1e-43
    x[9] = x[9].sign() * 3.4e38
    x[10, ::2] = 0.0
    x[11, ::7] *= 100
    x[12] = 0.0
    x[12, -1] = -5.0
    return x


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, NaNs to NaNs."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def random_codebooks(rows: int, columns: int, has_factors: bool) -> tuple[CodebookGrid, torch.Tensor]:
    nibbles = pack_nibbles(torch.randint(0, 16, (rows, columns), dtype=torch.uint8))
    if has_factors:
        return codebook_grid(nibbles, torch.randn(1, 16), torch.randn(rows, -(-columns // 64)))
    return codebook_grid(nibbles, torch.randn(rows, 16), None)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"spread-{format.spread}")
@pytest.mark.parametrize("kind", ["int8", "codebooks", "scaled codebook"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_int8_products_equal_the_reference_to_the_bit(
    rows: int, columns: int, kind: str, format: SparseInt8Format, has_bias: bool
) -> None:
    weight: CpuWeight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scale = torch.rand(rows)
    if kind != "int8":
        weight, scale = random_codebooks(rows, columns, kind == "scaled codebook")
    bias = torch.randn(rows) if has_bias else None
    matmul = CpuInt8Matmul(weight, scale, bias, format)
    codes = weight if isinstance(weight, torch.Tensor) else weight.expand()[:, :columns]
    x = activations(max(TOKENS), columns)
    # Of the reference, each row is by itself: so a row is equal alone and among any others.
    expected = reference(x, format, codes, scale, bias)
    assert not expected[4:7].isfinite().any()
    assert expected[:4].isfinite().all()
    for num_tokens in TOKENS:
        assert_same(matmul(x[:num_tokens]), expected[:num_tokens])
    assert_same(matmul(x[50:70]), expected[50:70])
    assert_same(matmul(quantize_sparse(x, format)), expected)
    assert matmul(x[:0]).shape == (0, rows)


def integer_product(
    x: torch.Tensor, format: SparseInt8Format, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The product with sums in int64."""
    (high, low), token_scale = sparse_reference(x, format)
    sums = [(term.long() @ weight.long().t()).float() for term in (high, low)]
    return (sums[0] * HIGH_STEPS + sums[1]) * token_scale * scale


@pytest.mark.parametrize("value", [-128, -127, 127])
@pytest.mark.parametrize("spread", [1.0, 1 / 256])
def test_sums_reach_the_bound_of_int32(value: int, spread: float) -> None:
    # A spread of 1 makes every low code 127; next to none makes every high code 127.
    format = SparseInt8Format(spread)
    weight = torch.full((18, MAX_IN_FEATURES), value, dtype=torch.int8)
    weight[1::2, 1::2] = 127
    signs = torch.ones(17, 1)
    signs[1::2] = -1
    x = (signs * 127.0).expand(-1, MAX_IN_FEATURES).contiguous()
    x[2, 1::2] *= -1
    matmul = CpuInt8Matmul(weight, torch.ones(18), None, format)
    expected = integer_product(x, format, weight, torch.ones(18))
    assert (expected[0, 0] - 127.0 * value * MAX_IN_FEATURES).abs() <= 1e-4 * 127 * 127 * MAX_IN_FEATURES
    for num_tokens in (1, 5, 17):
        assert torch.equal(matmul(x[:num_tokens]), expected[:num_tokens])


def test_more_input_features_than_sums_hold_are_refused() -> None:
    weight = torch.zeros(1, MAX_IN_FEATURES + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="overflow"):
        CpuInt8Matmul(weight, torch.ones(1), None, CPU_ACTIVATIONS)


@pytest.mark.parametrize("columns", [1, 64, 100, 576])
@pytest.mark.parametrize("book", ["normal", "flat", "zeros", "smallest", "largest"])
@pytest.mark.parametrize("scales", ["none", "random", "one above all", "zeros", "largest"])
def test_codebook_grid_is_within_half_a_step_of_int8(scales: str, book: str, columns: int) -> None:
    rows = 20
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    codebook = torch.randn(rows if scales == "none" else 1, 16)
    match book:
        case "flat":
            codebook[:] = -0.3
        case "zeros":
            codebook[:] = 0.0
        case "smallest":
            codebook = (codebook * 6e-8).half()
        case "largest":
            codebook = codebook.sign() * 65504.0
    scale = None if scales == "none" else torch.randn(rows, -(-columns // 64))
    if scale is not None and scales == "one above all":
        scale[:, -1] *= 1000
    elif scale is not None and scales != "random":
        scale[:] = 0.0 if scales == "zeros" else 65504.0
    grid, row_scale = codebook_grid(pack_nibbles(codes), codebook, scale)
    weight = codebook.double().expand(rows, -1).gather(1, codes.long())
    if scale is not None:
        weight = weight * scale.double().repeat_interleave(64, dim=1)[:, :columns]
    error = (grid.expand()[:, :columns] * row_scale.double()[:, None] - weight).abs()
    # Half a step; with factors, in 256ths of one, half for the value, half for the product and one for the factor,
    # which 1 is 2**-15 too much for.
    bound = 0.5 if scale is None else 0.5 + 2 / 256
    assert torch.all(error <= row_scale.double()[:, None] * (bound + 1e-4))


def test_codebooks_expand_by_rows() -> None:
    for has_factors in (False, True):
        grid, _ = random_codebooks(50, 100, has_factors)
        parts = [grid.expand(0, 17), grid.expand(17, 40), grid.expand(40, 80)]
        assert torch.equal(torch.cat(parts), grid.expand())


@pytest.mark.parametrize(("has_factors", "bits"), [(False, 4 + 128 / 512), (True, 4.25 + 32 / 512)])
def test_codebooks_take_little_more_than_four_bits(has_factors: bool, bits: float) -> None:
    grid, _ = random_codebooks(32, 512 * 2 if has_factors else 512, has_factors)
    packed = pack_codebook(grid)
    assert packed.numel() * 8 <= bits * grid.nibbles.numel() * 2


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_float_products_are_within_their_rounding(rows: int, columns: int, has_bias: bool) -> None:
    weight, x = torch.randn(rows, columns), torch.randn(max(TOKENS), columns)
    x[1], x[2], x[3, 0] = 0.0, 0.7, 1e6
    bias = torch.randn(rows) if has_bias else None
    exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    # A chain of K fused products rounds K times, each time by 2**-24 of a part of this sum; then the bias.
    size = x.double().abs() @ weight.double().abs().t() + (0.0 if bias is None else bias.double().abs())
    matmul = CpuFloatMatmul(weight, bias)
    together = matmul(x)
    assert torch.all((together - exact).abs() <= size * (columns + 1) * 2**-24)
    for num_tokens in TOKENS:
        assert torch.equal(matmul(x[:num_tokens]), together[:num_tokens])
        assert torch.equal(matmul(x[-num_tokens:]), together[-num_tokens:])
    assert matmul(x[:0]).shape == (0, rows)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    x = torch.randn(9, 100)
    x[4, 7] = value
    for matmul in (
        CpuFloatMatmul(torch.randn(40, 100), None),
        CpuInt8Matmul(torch.full((40, 100), 3, dtype=torch.int8), torch.ones(40), None, CPU_ACTIVATIONS),
    ):
        is_finite = matmul(x).isfinite()
        assert not is_finite[4].any()
        assert is_finite[[0, 1, 2, 3, 5, 6, 7, 8]].all()
