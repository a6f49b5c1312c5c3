"""The CPU's attention in torch against attention written out, over scattered blocks and every kind of chunk."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.attention.dispatch import paged_attention, reference
from engine.kernels.attention.kv_layer import INT4, KVCache, KVLayer
from engine.kernels.attention.plan import AttentionPlan


def plan_of(chunks: list[tuple[int, int]], block_tables: torch.Tensor) -> AttentionPlan:
    """The plan of chunks, (tokens before, tokens) each, whose block tables are the last rows, in reverse."""
    sizes = [size for _, size in chunks]
    return AttentionPlan(
        query_starts=torch.tensor([0, *sizes]).cumsum(0).int(),
        starts=torch.tensor([start for start, _ in chunks], dtype=torch.int32),
        table_rows=(len(block_tables) - 1 - torch.arange(len(chunks))).int(),
        block_tables=block_tables,
    )


@pytest.mark.parametrize("window", [None, 1, 5, 32])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 80), (2, 2, 96), (4, 2, 256), (2, 1, 24)]
)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_equals_the_reference(
    window: int | None, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Decodes, chunks, a fresh prompt, one token alone.
    chunks = [(37, 1), (0, 20), (11, 7), (0, 1), (15, 1), (16, 16), (600, 1)]
    width = -(-601 // block_size)
    blocks = torch.randperm(len(chunks) * width, generator=generator).int() + 1
    plan = plan_of(chunks, blocks.view(len(chunks), width))
    # What is read before it was written shows.
    layer = KVLayer(torch.full((2, len(blocks) + 1, block_size, num_kv_heads, head_dim), torch.nan))
    queries, expected = [], []
    for (start, size), row in zip(chunks, plan.table_rows.tolist(), strict=True):
        positions = torch.arange(start + size)
        table = plan.block_tables[row]
        slots = table.long()[positions // block_size] * block_size + positions % block_size
        layer.write(slots, *torch.randn(2, start + size, num_kv_heads, head_dim, generator=generator))
        queries.append(torch.randn(size, num_heads, head_dim, generator=generator))
        expected.append(reference(queries[-1], layer, table, start, 0.3, window))
    # Queries as they come: beside keys.
    beside = torch.cat((torch.cat(queries), torch.zeros(47, num_kv_heads, head_dim)), dim=1)
    output = paged_attention(beside[:, :num_heads], layer, plan, 0.3, window)
    torch.testing.assert_close(output, torch.cat(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int8, INT4])
@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_codes_are_attended_to_as_the_floats_that_they_stand_for(head_dim: int, dtype: torch.dtype) -> None:
    codes = KVCache.allocate(1, 9, 4, 3, head_dim, dtype, torch.device("cpu")).layer(0)
    floats = KVLayer(torch.empty(2, 9, 4, 3, head_dim))
    slots = torch.arange(36)
    codes.write(slots, *torch.randn(2, 36, 3, head_dim))
    floats.write(slots, *codes.read(slots))
    plan = plan_of([(9, 1), (4, 6)], torch.tensor([[5, 8, 6], [1, 2, 3]], dtype=torch.int32))
    queries = torch.randn(7, 9, head_dim)
    expected, actual = (paged_attention(queries, layer, plan, 0.1, 7) for layer in (floats, codes))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    layer = KVLayer(torch.randn(2, 9, 4, 3, 64))
    tables = torch.tensor([[5, 8, 6], [1, 2, 3]], dtype=torch.int32)
    queries = torch.randn(7, 9, 64).to(dtype)
    together = paged_attention(queries, layer, plan_of([(9, 1), (4, 6)], tables), 0.1)
    assert together.dtype == dtype
    decode = paged_attention(queries[:1], layer, plan_of([(9, 1)], tables[1:]), 0.1)
    chunk = paged_attention(queries[1:], layer, plan_of([(4, 6)], tables[:1]), 0.1)
    assert torch.equal(torch.cat((decode, chunk)), together)
