"""The Triton products with sparse weights have the bits of those with the same weight, stored dense."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.matmul.int4 import Int4Matmul
from engine.kernels.matmul.int8 import Int8Matmul
from engine.kernels.matmul.sparse24 import CENTRE, compress
from engine.kernels.nibbles import pack_nibbles
from engine.kernels.operands import Int8Format
from tests.helpers.sparse import sparse_integers

SHAPES = [(1, 40, 128), (3, 33, 300), (17, 16, 36), (200, 20, 64)]
"""(M, N, K): with tails of every size, and more tokens than the segments' form takes."""


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), SHAPES)
def test_int8(num_tokens: int, rows: int, columns: int, terms: int) -> None:
    generator = torch.Generator().manual_seed(0)
    integers = sparse_integers(rows, columns, 8, generator)
    scale, bias = (torch.randn(rows, generator=generator) for _ in range(2))
    x = torch.randn(num_tokens, columns, generator=generator)
    format = Int8Format(1 if terms == 1 else 2)
    expected = Int8Matmul(integers, scale, bias, format)(x)
    assert torch.equal(Int8Matmul(compress(integers, 8), scale, bias, format)(x), expected)


@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("num_tokens", "rows", "columns"), SHAPES)
def test_int4(num_tokens: int, rows: int, columns: int, group_size: int, is_batch_invariant: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    integers = sparse_integers(rows, columns, 4, generator)
    scale = torch.rand(rows, -(-columns // group_size), generator=generator).half()
    bias, x = torch.randn(rows, generator=generator), torch.randn(num_tokens, columns, generator=generator)
    codes = pack_nibbles((integers + CENTRE).view(torch.uint8))
    dense = Int4Matmul(codes, scale, -CENTRE * scale, group_size, bias, is_batch_invariant)
    sparse = Int4Matmul(compress(integers, 4), scale, None, group_size, bias, is_batch_invariant)
    assert torch.equal(sparse(x), dense(x))
