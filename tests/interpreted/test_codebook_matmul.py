"""The Triton body of products with codebooks against float64, and what its bits must not depend on."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.launch import Tile
from engine.kernels.matmul.codebook import dequantize
from engine.kernels.matmul.codebook_triton import CodebookMatmul, codebook_matmul
from engine.kernels.nibbles import pack_nibbles
from engine.kernels.operands import GroupSums
from engine.quant.codebook import nf4_values
from engine.quant.codebook4 import Codebook4
from engine.quant.nf4 import NF4
from engine.quant.scheme import Scheme

SHAPES = [(1, 16, 128), (3, 40, 100), (17, 33, 1300), (2, 5, 7)]
"""(M, N, K): with tails of every size; one segment and two."""


def small_tile(block_m: int, block_n: int, block_k: int) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}, 4, 1, max_tokens=128)


def random_codes(rows: int, columns: int) -> torch.Tensor:
    return pack_nibbles(torch.randint(0, 16, (rows, columns), dtype=torch.uint8))


def scales(rows: int, columns: int) -> tuple[int, int]:
    return rows, -(-columns // 64)


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), SHAPES)
def test_exact_where_sums_are(is_scaled: bool, num_tokens: int, rows: int, columns: int) -> None:
    """Small integers and scales of few bits: every sum is exact, whatever the tile and the number of programs."""
    codes, x = random_codes(rows, columns), torch.randint(-4, 5, (num_tokens, columns)).float()
    codebook = torch.randint(-40, 41, (1 if is_scaled else rows, 16)).float()
    scale = torch.randint(1, 4, scales(rows, columns)).div(4) if is_scaled else None
    expected = (x.double() @ dequantize(codes, codebook, scale, columns).double().t()).float()
    matmul = CodebookMatmul(codes, codebook, scale)
    assert torch.equal(matmul(x), expected)
    for tile, segments_per_program in ((small_tile(16, 16, 128), 2), (small_tile(32, 64, 256), 1)):
        assert torch.equal(codebook_matmul(x, matmul, tile, segments_per_program), expected)
        assert not matmul.counters.any()


@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_within_float32_rounding(is_scaled: bool, dtype: torch.dtype) -> None:
    num_tokens, rows, columns = 17, 33, 300
    codes, bias = random_codes(rows, columns), torch.randn(rows)
    codebook = torch.randn(1, 16) if is_scaled else torch.randn(rows, 16).half()
    scale = torch.rand(scales(rows, columns)) if is_scaled else None
    x = torch.randn(num_tokens, columns).to(dtype)
    y = CodebookMatmul(codes, codebook, scale, bias)(GroupSums(x, torch.empty(0)))
    assert y.dtype == dtype
    # The codebook's values are those of the activations' type.
    weight = dequantize(codes, codebook.to(dtype), scale, columns).double()
    expected = x.double() @ weight.t() + bias
    # K products and what joins them each round to 2^-24 of at most the sum of magnitudes; the result rounds once to
    # its type, which the interpreter does by cutting bfloat16 off.
    bound = (columns + 10) * 2**-24 * (x.double().abs() @ weight.abs().t() + bias.abs())
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    bound += rounding * (expected.abs() + bound)
    assert torch.all((y.double() - expected).abs() <= bound)


@pytest.mark.parametrize("is_scaled", [False, True])
def test_shared_segments_are_added_in_order(is_scaled: bool) -> None:
    """Values whose sum depends on the order: one program's and several programs' bits are equal."""
    codebook = torch.randn(1 if is_scaled else 32, 16)
    matmul = CodebookMatmul(
        random_codes(32, 3100), codebook, torch.rand(scales(32, 3100)) if is_scaled else None
    )
    x = torch.randn(2, 3100) * torch.logspace(3, -3, 3100)
    tile = small_tile(16, 32, 256)
    together = codebook_matmul(x, matmul, tile, 4)
    for segments_per_program in (1, 2, 3):
        assert torch.equal(codebook_matmul(x, matmul, tile, segments_per_program), together)


@pytest.mark.parametrize("scheme", [NF4(), Codebook4()], ids=lambda scheme: scheme.name)
def test_schemes_use_it(scheme: Scheme) -> None:
    weight, x = torch.randn(48, 200), torch.randn(3, 200)
    stored = scheme.quantize(weight)
    matmul = scheme.bind(stored, None)
    assert isinstance(matmul, CodebookMatmul)
    codebook = stored.get("codebook", nf4_values()[None])
    expected = x.double() @ dequantize(stored["codes"], codebook, stored.get("scale"), 200).double().t()
    # Two hundred products and sums of float32, of values about 1.
    assert torch.allclose(matmul(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_row_alone_and_in_a_batch() -> None:
    matmul = CodebookMatmul(random_codes(48, 200), torch.randint(-40, 41, (48, 16)).float())
    x = torch.randint(-4, 5, (40, 200)).float()
    together = matmul(x)
    for row in (0, 16, 39):
        assert torch.equal(matmul(x[row : row + 1])[0], together[row])
    x[5] = torch.nan
    assert torch.equal(matmul(x)[:5], together[:5])
