"""Heads of an int8 cache, spread over all their dimensions: by whichever body, and what it is good for."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.attention.kv_layer import KVCache
from engine.kernels.hadamard import hadamard_factors, hadamard_levels, spread_heads
from engine.kernels.rotary import rotate_and_write, torch_rotate_and_write

HEAD_DIMS = [6, 16, 24, 64, 80, 96, 128, 256]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_products_of_queries_and_keys_stay(head_dim: int) -> None:
    queries, keys = torch.randn(2, 50, head_dim)
    query_factor, key_factor = hadamard_factors(head_dim)
    spread = spread_heads(queries, query_factor).double() @ spread_heads(keys, key_factor).double().T
    torch.testing.assert_close(spread, queries.double() @ keys.double().T, rtol=0, atol=1e-5 * head_dim)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_an_element_is_spread_over_the_largest_power_of_two(head_dim: int) -> None:
    spread = spread_heads(torch.eye(head_dim), 1.0)
    size = 2 ** (hadamard_levels(head_dim) + 1)
    assert head_dim % size == 0
    assert (head_dim // size) % 2 == 1
    assert torch.equal(spread.abs().sum(1), torch.full((head_dim,), float(size)))
    assert torch.equal(spread @ spread.T, size * torch.eye(head_dim))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_bodies_spread_to_the_bit_alike(head_dim: int) -> None:
    heads = torch.randn(5, 4 + 2 * 2, head_dim) * 10.0 ** torch.arange(-2, 3)[:, None, None]
    slots = torch.arange(5, dtype=torch.int32)
    unturned = torch.ones(5, head_dim // 2), torch.zeros(5, head_dim // 2)
    layers = [
        KVCache.allocate(1, 1, 8, 2, head_dim, torch.int8, torch.device("cpu")).layer(0) for _ in range(2)
    ]
    queries = [
        function(heads.clone(), slots, *unturned, layer, slots, 2)
        for function, layer in zip((rotate_and_write, torch_rotate_and_write), layers, strict=True)
    ]
    assert torch.equal(queries[0], queries[1])
    assert torch.equal(queries[0], spread_heads(heads[:, :4], hadamard_factors(head_dim)[0]))
    for mine, expected in zip(layers[0].read(slots), layers[1].read(slots), strict=True):
        assert torch.equal(mine, expected)


def test_a_few_large_dimensions_of_keys_no_longer_coarsen_the_others() -> None:
    heads = torch.randn(40, 3, 64)
    heads[:, 1, [7, 20, 50]] += torch.tensor([30.0, 25.0, -20.0])
    slots, unturned = torch.arange(40, dtype=torch.int32), (torch.ones(40, 32), torch.zeros(40, 32))
    exact = heads[:, 0].double() @ heads[:, 1].double().T
    layer = KVCache.allocate(1, 5, 8, 1, 64, torch.int8, torch.device("cpu")).layer(0)
    queries = rotate_and_write(heads.clone(), slots, *unturned, layer, slots, 1)[:, 0].double()
    error = (queries @ layer.read(slots)[0][:, 0].double().T - exact).square().mean()
    layer.write(slots.long(), heads[:, 1:2], heads[:, 2:])
    as_it_is = (heads[:, 0].double() @ layer.read(slots)[0][:, 0].double().T - exact).square().mean()
    assert error < as_it_is / 5
