"""The CPU's products in groups along K: both bodies equal sums in int64 to the bit, alone and among other tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from engine.kernels import cpu
from engine.kernels import quantize as quantization
from engine.kernels.matmul.cpu_grouped import (
    GROUP_SIZES,
    CpuGroupedMatmul,
    quantize_groups,
    reference,
)
from engine.kernels.matmul.grouped_weight import GroupedWeight, GroupNumbers
from engine.kernels.nibbles import pack_nibbles
from engine.kernels.operands import GroupSize, Int8Format, SparseInt8Format
from engine.kernels.quantize import TINY, quantize_sparse, sparse_reference
from engine.quant.block_weight import BLOCK_TYPES
from tests.helpers.block_weights import grouped, random_block_weight

SHAPES = [(1, 1), (3, 2), (16, 32), (17, 33), (48, 64), (70, 100), (40, 300), (129, 576)]
"""Output and input features: whole panels, groups and lines, and parts of them."""

TOKENS = [*range(1, 34), 100, 191, 192, 193, 200]
"""Beside the sizes of tiles (4, 6) and of chunks (192)."""

SPARSE = [SparseInt8Format(1.2), SparseInt8Format(0.0), SparseInt8Format(math.inf)]
"""Few high terms, which are multiplied one by one; nearly all, which are multiplied as low ones are; none."""


@pytest.fixture
def compiler() -> None:
    if cpu.library() is None:
        pytest.skip("there is no C compiler on this machine")


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, NaNs to NaNs."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def activations(num_tokens: int, in_features: int) -> torch.Tensor:
    """Random tokens, and among the first of them every kind that is not."""
    x = torch.randn(num_tokens, in_features) * 3
    x[0, 0] = 1000.0
    x[1] = 0.0
    x[2] = 0.7
    x[3, -1] = 1e6
    x[4, in_features // 2] = torch.nan
    x[5, -1] = torch.inf
    x[6, 0] = -torch.inf
    x[7] *= 1e-30
    x[8] *= 1e-43
    x[9] = x[9].sign() * 3.4e38
    x[10, : in_features // 2] = 0.0
    x[11, ::7] *= 100
    x[12] = 0.0
    x[12, -1] = -5.0
    return x


def weights(rows: int, columns: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales in groups; some groups are empty."""
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scale = torch.rand(rows, -(-columns // group_size)).half()
    codes[::5, :group_size] = 0
    scale[::5, 0] = 0
    return codes, scale


def sums_of_groups(codes: torch.Tensor, weight: torch.Tensor, group_size: int) -> list[torch.Tensor]:
    """Of each group the sums [M, N] in int64, as float32."""
    pairs = zip(codes.long().split(group_size, dim=1), weight.long().split(group_size, dim=1), strict=True)
    return [(left @ right.t()).float() for left, right in pairs]


def product_with_token_scales(
    x: torch.Tensor, format: SparseInt8Format, weight: torch.Tensor, scale: torch.Tensor, group_size: int
) -> torch.Tensor:
    terms, token_scale = sparse_reference(x, format)
    totals = [
        sum(
            sums * scale[:, group].float()
            for group, sums in enumerate(sums_of_groups(term, weight, group_size))
        )
        for term in terms
    ]
    return (totals[0] * 128 + totals[1]) * token_scale


def product_with_group_scales(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, group_size: GroupSize
) -> torch.Tensor:
    codes = quantization.reference(x, Int8Format(1, group_size))
    total = torch.zeros(len(x), len(weight))
    for group, sums in enumerate(sums_of_groups(codes.high, weight, group_size)):
        share = sums * codes.scale[:, group, None]
        total += share * scale[:, group].float() if scale.dim() == 2 else share
    return total * scale if scale.dim() == 1 else total


def check(matmul: CpuGroupedMatmul, of_torch: torch.Tensor, x: torch.Tensor, expected: torch.Tensor) -> None:
    assert not expected[4:7].isfinite().any()
    assert expected[:4].isfinite().all()
    assert_same(of_torch, expected)
    for num_tokens in TOKENS:
        assert_same(matmul(x[:num_tokens]), expected[:num_tokens])
    assert_same(matmul(x[50:70]), expected[50:70])
    assert matmul(x[:0]).shape == (0, expected.shape[1])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("format", SPARSE, ids=lambda format: f"spread-{format.spread}")
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_of_weights_in_groups(
    rows: int, columns: int, format: SparseInt8Format, group_size: GroupSize
) -> None:
    weight, scale = weights(rows, columns, group_size)
    x, bias = activations(max(TOKENS), columns), torch.randn(rows)
    in_groups = grouped(weight, scale, group_size)
    matmul = CpuGroupedMatmul(in_groups, None, bias, format)
    expected = product_with_token_scales(x, format, weight, scale, group_size) + bias
    check(matmul, reference(x, format, in_groups, None, bias), x, expected)
    assert matmul.format == format
    assert_same(matmul(quantize_sparse(x, format)), expected)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("format", SPARSE, ids=lambda format: f"spread-{format.spread}")
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_of_nibbles_with_minimums(
    rows: int, columns: int, format: SparseInt8Format, group_size: GroupSize
) -> None:
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scale, minimum = torch.randn(2, rows, -(-columns // group_size)).half()
    x, bias = activations(max(TOKENS), columns), torch.randn(rows)
    weight = GroupedWeight(
        codes=pack_nibbles(codes),
        in_features=columns + columns % 2,
        group_size=group_size,
        scale=GroupNumbers(scale),
        minimum=GroupNumbers(minimum),
        bits=4,
    )
    terms, token_scale = sparse_reference(x, format)
    totals = []
    for term in terms:
        total = torch.zeros(len(x), rows)
        ones = torch.ones(1, columns, dtype=torch.int8)
        of_weight, of_codes = (sums_of_groups(term, right, group_size) for right in (codes, ones))
        for group, (sums, own) in enumerate(zip(of_weight, of_codes, strict=True)):
            total = total + sums * scale[:, group].float()
            total = total + own * minimum[:, group].float()
        totals.append(total)
    expected = (totals[0] * 128 + totals[1]) * token_scale + bias
    matmul = CpuGroupedMatmul(weight, None, bias, format)
    check(matmul, reference(x, format, weight, None, bias), x, expected)
    assert_same(matmul(quantize_sparse(x, format)), expected)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("has_weight_groups", [True, False])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_products_of_activations_in_groups(
    rows: int, columns: int, has_weight_groups: bool, group_size: GroupSize
) -> None:
    weight, scale = weights(rows, columns, group_size)
    scale = scale if has_weight_groups else torch.rand(rows)
    x, format = activations(max(TOKENS), columns), Int8Format(1, group_size)
    in_groups = grouped(weight, scale if has_weight_groups else None, group_size)
    row_scale = None if has_weight_groups else scale
    matmul = CpuGroupedMatmul(in_groups, row_scale, None, format)
    expected = product_with_group_scales(x, weight, scale, group_size)
    check(matmul, reference(x, format, in_groups, row_scale, None), x, expected)
    assert matmul.format is None


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", BLOCK_TYPES)
@pytest.mark.parametrize("format", SPARSE, ids=lambda format: f"spread-{format.spread}")
def test_products_of_weights_of_gguf_types(kind: str, format: SparseInt8Format) -> None:
    for rows, columns in ((17, 256), (70, 1024)) if BLOCK_TYPES[kind].block_size else ((17, 32), (70, 608)):
        weight, bias = random_block_weight(kind, rows, columns), torch.randn(rows)
        x = activations(max(TOKENS), columns)
        expected = product_of_block_weight(x, format, weight.grouped) + bias
        matmul = CpuGroupedMatmul(weight.grouped, None, bias, format)
        check(matmul, reference(x, format, weight.grouped, None, bias), x, expected)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", ["q5_0", "q5_1", "q5_k", "q6_k"])
@pytest.mark.parametrize("format", SPARSE, ids=lambda format: f"spread-{format.spread}")
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_packed_codes_give_the_bits_of_bytes(
    rows: int, columns: int, format: SparseInt8Format, kind: str
) -> None:
    weight, x = random_block_weight(kind, rows, columns).grouped, activations(max(TOKENS), columns)
    packed = CpuGroupedMatmul(weight, None, None, format)
    in_bytes = CpuGroupedMatmul(
        replace(weight, codes=weight.codes.to(torch.int8), bits=8), None, None, format
    )
    for num_tokens in TOKENS:
        assert_same(packed(x[:num_tokens]), in_bytes(x[:num_tokens]))
    bits = 8 * packed.get_buffer("weight").numel()
    assert bits == weight.bits * -(-rows // 16) * 16 * -(-columns // 64) * 64


def product_of_block_weight(x: torch.Tensor, format: SparseInt8Format, weight: GroupedWeight) -> torch.Tensor:
    """In int64 and float32, group by group."""
    terms, token_scale = sparse_reference(x, format)
    assert weight.scale is not None
    scale, size = weight.scale.expand(), weight.group_size
    minimum = None if weight.minimum is None else weight.minimum.expand()
    totals = []
    for term in terms:
        total = torch.zeros(len(x), len(weight.codes))
        for group, sums in enumerate(sums_of_groups(term, weight.integers(), size)):
            total += sums * scale[:, group]
            if minimum is not None:
                own = term[:, group * size : (group + 1) * size].long().sum(dim=1, keepdim=True)
                total += own.float() * minimum[:, group]
        totals.append(total)
    return (totals[0] * 128 + totals[1]) * token_scale


@pytest.mark.usefixtures("compiler")
def test_a_product_goes_where_it_is_wanted() -> None:
    weight, x = random_block_weight("q4_k", 40, 256), torch.randn(9, 256)
    matmul = CpuGroupedMatmul(weight.grouped, None, None, SPARSE[0])
    wide = torch.full((9, 60), torch.nan)
    assert matmul(x, wide[:, 10:50]).data_ptr() == wide[:, 10:50].data_ptr()
    assert_same(wide[:, 10:50], matmul(x))
    assert wide[:, :10].isnan().all()
    assert wide[:, 50:].isnan().all()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 576])
def test_codes_of_groups_equal_the_reference(columns: int, group_size: GroupSize) -> None:
    x = activations(20, columns)
    wide = torch.full((20, columns + 5), torch.nan)
    wide[:, :columns] = x
    expected = quantization.reference(x, Int8Format(1, group_size))
    for source in (x, wide[:, :columns]):
        codes = quantize_groups(source, group_size)
        assert_same(codes.scale, expected.scale)
        is_finite = expected.scale.isfinite().repeat_interleave(group_size, dim=1)[:, :columns]
        assert torch.equal(codes.high[:, :columns] * is_finite, expected.high * is_finite)
        assert not codes.high[:, columns:].any()
        assert not codes.high[:, :columns][~is_finite].any()
    assert torch.all(expected.scale[1] == TINY)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("format", [SparseInt8Format(1 / 256), Int8Format(1, 128)], ids=str)
def test_sums_reach_their_bounds(format: SparseInt8Format | Int8Format) -> None:
    weight = torch.full((18, 256), -128, dtype=torch.int8)
    x = torch.full((7, 256), 127.0)
    x[1::2] *= -1
    product = CpuGroupedMatmul(grouped(weight, torch.ones(18, 2).half(), 128), None, None, format)(x)
    # Only the scale and the products with it round: the sums are whole numbers that floats hold.
    assert torch.allclose(product, x @ weight.float().t(), rtol=2**-20, atol=0)


@pytest.mark.parametrize("format", [*SPARSE, Int8Format(1, 32)], ids=str)
def test_products_are_close_to_those_of_floats(format: SparseInt8Format | Int8Format) -> None:
    weight, scale = weights(40, 300, 32)
    x = torch.randn(9, 300)
    if isinstance(format, Int8Format):
        step = quantization.reference(x, format).scale.repeat_interleave(32, dim=1)[:, :300]
    else:
        step = sparse_reference(x, format)[1].expand(-1, 300)
    dequantized = weight.double() * scale.double().repeat_interleave(32, dim=1)[:, :300]
    error = CpuGroupedMatmul(grouped(weight, scale, 32), None, None, format)(x) - x.double() @ dequantized.t()
    # Half a step of each activation, and what float32 rounds in the sums and in products with a scale's inverse.
    bound = step.double() / 2 @ dequantized.abs().t() + 2**-20 * x.double().abs() @ dequantized.abs().t()
    assert torch.all(error.abs() <= bound)
