"""Rows of an embedding table: the Triton body equals torch's to the bit."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.embedding import lookup, reference
from engine.kernels.launch import Tile

DTYPES = [torch.float32, torch.float16]  # the interpreter cuts off what it should round to bf16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_tokens", "features"), [(1, 64), (3, 300), (17, 50), (2, 1)])
def test_equals_the_reference(
    num_tokens: int, features: int, index_dtype: torch.dtype, is_int8: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 40, (num_tokens,), generator=generator).to(index_dtype)
    token_ids[-1] = 39
    if is_int8:
        table = torch.randint(-127, 128, (40, features), generator=generator, dtype=torch.int8)
        scale = torch.rand(40, -(-features // 32), generator=generator).half()
    else:
        table, scale = torch.randn(40, features, generator=generator).to(dtype), None
    expected = reference(token_ids, table, scale, dtype)
    for block in (32, 512):
        y = lookup(token_ids, table, scale, dtype, tile=Tile({"BLOCK": block}, 4, 1))
        assert y.dtype == dtype
        assert torch.equal(y, expected)
    assert torch.equal(lookup(token_ids, table, scale, dtype), expected)
