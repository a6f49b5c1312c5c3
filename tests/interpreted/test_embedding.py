"""Rows of an embedding table: the Triton body equals torch's to the bit."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.embedding import lookup, reference
from engine.kernels.launch import Tile

DTYPES = [torch.float32, torch.float16]  # the interpreter cuts off what it should round to bf16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["float", "int8", "int8:g32"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_tokens", "features"), [(1, 64), (3, 300), (17, 50), (2, 1)])
def test_equals_the_reference(
    num_tokens: int, features: int, index_dtype: torch.dtype, kind: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(0, 40, (num_tokens,), generator=generator).to(index_dtype)
    token_ids[-1] = 39
    table, scale = torch.randn(40, features, generator=generator).to(dtype), None
    if kind != "float":
        table = torch.randint(-127, 128, (40, features), generator=generator, dtype=torch.int8)
        shape = (40,) if kind == "int8" else (40, -(-features // 32))
        scale = torch.rand(shape, generator=generator)
    group_size = 32 if kind == "int8:g32" else None
    expected = reference(token_ids, table, scale, group_size, dtype)
    for block in (32, 512):
        y = lookup(token_ids, table, scale, group_size, dtype, tile=Tile({"BLOCK": block}, 4, 1))
        assert y.dtype == dtype
        assert torch.equal(y, expected)
    assert torch.equal(lookup(token_ids, table, scale, group_size, dtype), expected)
