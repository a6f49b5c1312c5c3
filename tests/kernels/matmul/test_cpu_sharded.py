"""Products whose input features are shared: the bits of the whole product, whatever the number of ranks."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels import cpu
from engine.kernels.matmul.cpu_int8 import CpuInt8Matmul, reference
from engine.kernels.matmul.cpu_sharded import ShardedInt8Matmul, block_maxima, num_terms, quantize_part
from engine.kernels.matmul.int8 import MAX_IN_FEATURES
from engine.kernels.operands import SparseInt8Format
from engine.quant.cpu_formats import CPU_ACTIVATIONS, ONE_TERM, TWO_TERMS

TOKENS = [1, 2, 5, 12, 13, 16, 33, 192, 200]
"""Beside the sizes of tiles (12, 16, 32) and of chunks (192)."""


@pytest.fixture(autouse=True)
def compiler() -> None:
    if cpu.library() is None:
        pytest.skip("there is no C compiler on this machine")


def activations(num_tokens: int, in_features: int) -> torch.Tensor:
    """Random tokens, and among the first of them every kind that is not."""
    x = torch.randn(num_tokens, in_features) * 3
    x[0, 0] = 1000.0
    if num_tokens > 12:
        x[1], x[2], x[3, -1] = 0.0, 0.7, 1e6
        x[4, in_features // 2], x[5, -1], x[6, 0] = torch.nan, torch.inf, -torch.inf
        x[7] *= 1e-30
        x[8] *= 1e-43
        x[9] = x[9].sign() * 3.4e38
        x[10, ::2] = 0.0
        x[11, ::7] *= 100
        x[12, 40] = -torch.nan
    return x


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    size: int,
    format: SparseInt8Format,
) -> torch.Tensor:
    """The product on `size` ranks, one after the other, their exchanges written out."""
    out_features, terms = len(weight), num_terms(format)
    width = out_features // size
    parts = [part.contiguous() for part in x.chunk(size, dim=1)]
    maxima = torch.cat([block_maxima(part) for part in parts], dim=1)
    codes = [quantize_part(part, maxima, format) for part in parts]
    products = [
        ShardedInt8Matmul(columns, scale, bias, slice(rank * width, (rank + 1) * width), size, terms)
        for rank, columns in enumerate(weight.chunk(size, dim=1))
    ]
    sums = [product.sums(part).view(size, -1) for product, part in zip(products, codes, strict=True)]
    return torch.cat(
        [
            product.finish(torch.cat([of_rank[rank] for of_rank in sums]), codes[rank])
            for rank, product in enumerate(products)
        ],
        dim=1,
    )


@pytest.mark.parametrize("format", [CPU_ACTIVATIONS, TWO_TERMS, ONE_TERM], ids=lambda f: f"spread-{f.spread}")
@pytest.mark.parametrize(
    ("rows", "columns", "size"),
    [(4, 64, 2), (66, 192, 3), (72, 288, 3), (64, 96, 1), (192, 1536, 3), (100, 4096 + 128, 4)],
)
def test_shares_have_the_bits_of_the_whole(
    rows: int, columns: int, size: int, format: SparseInt8Format
) -> None:
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scale, bias = torch.rand(rows), torch.randn(rows)
    x = activations(max(TOKENS), columns)
    expected = reference(x, format, weight, scale, bias)
    is_finite = expected.isfinite().all(dim=1)
    assert not is_finite[[4, 5, 6, 12]].any()
    assert is_finite[13:].all()
    for num_tokens in TOKENS:
        y = multiply(x[:num_tokens], weight, scale, bias, size, format)
        torch.testing.assert_close(y, expected[:num_tokens], rtol=0, atol=0, equal_nan=True)
    without_bias = multiply(x[50:70], weight, scale, None, size, format)
    assert torch.equal(without_bias, CpuInt8Matmul(weight, scale, None, format)(x[50:70]))


def test_sums_of_ranks_reach_the_bound_of_int32() -> None:
    # Codes are 127, low or high by the spread; the sum of all is near 2**31, that of each rank within it.
    columns = MAX_IN_FEATURES // 64 * 64
    weight = torch.full((2, columns), -128, dtype=torch.int8)
    x = torch.full((1, columns), 127.0)
    for spread in (1.0, 1 / 256):
        format = SparseInt8Format(spread)
        y = multiply(x, weight, torch.ones(2), None, 2, format)
        assert torch.equal(y, CpuInt8Matmul(weight, torch.ones(2), None, format)(x))
        assert math.isclose(y[0, 0].item(), -127.0 * 128 * columns, rel_tol=1e-4)


def test_what_a_rank_quantizes_is_its_part_of_the_token() -> None:
    # Its own columns would have another scale: the other rank's are a hundred times larger.
    x = torch.randn(3, 128)
    x[:, 64:] *= 100
    whole = torch.cat([block_maxima(x[:, :64]), block_maxima(x[:, 64:])], dim=1)
    assert torch.equal(whole, x.abs().unflatten(1, (-1, 32)).amax(dim=2))
    codes = quantize_part(x[:, :64], whole, ONE_TERM)
    assert torch.equal(
        codes.low, (x[:, :64] * (1 / (x.abs().amax(dim=1, keepdim=True) * (1 / 127)))).round().to(torch.int8)
    )
