"""Paged attention with torch's operators, where there is no C body: no compiler, or not float32.

Keys and values are read as stored in the cache, those of the step itself too, so that a token cannot tell in
which chunk its prompt arrived. A sequence is computed by itself: what is beside it in the batch does not enter.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from engine.kernels.attention.kv_layer import KVLayer
from engine.kernels.attention.plan import AttentionPlan


def torch_attention(
    queries: torch.Tensor, layer: KVLayer, plan: AttentionPlan, scale: float, window: int | None
) -> torch.Tensor:
    """Causal attention of each sequence's queries over its own keys, which are in the cache already.

    Args:
        queries: [T, heads, head_dim] float; tokens may be apart in memory.
        window: Keys that a query sees, its own among them; None for all.

    Returns:
        [T, heads * head_dim] of the queries' dtype.
    """
    output = queries.new_empty(queries.shape)
    chunks = pairwise(plan.query_starts.tolist())
    sequences = zip(chunks, plan.starts.tolist(), plan.table_rows.tolist(), strict=True)
    for (first, last), start, row in sequences:
        block_table = plan.block_tables[row]
        output[first:last] = _attend(queries[first:last], layer, block_table, start, scale, window)
    return output.flatten(1)


def _attend(
    queries: torch.Tensor,
    layer: KVLayer,
    block_table: torch.Tensor,
    start: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """One sequence's: queries [Q, heads, D] at positions start … → [Q, heads, D]."""
    (num_queries, num_heads, head_dim), num_kv_heads = queries.shape, layer.data.shape[3]
    group, end = num_heads // num_kv_heads, start + num_queries
    # The oldest key that the first query sees.
    oldest = 0 if window is None else max(0, start - window + 1)
    keys, values = _read(layer, block_table, oldest, end).to(queries.dtype).split(1)
    # The query heads that share a key head become more query rows of it: [1, kv_heads, group * Q, D].
    folded = queries.view(num_queries, num_kv_heads, group, head_dim)
    folded = folded.permute(1, 2, 0, 3).reshape(1, num_kv_heads, group * num_queries, head_dim)
    mask = None
    if num_queries > 1:
        mask = _mask(num_queries, end - oldest, start - oldest, window, queries.dtype).repeat(group, 1)
    result = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    result = result.view(num_kv_heads, group, num_queries, head_dim).permute(2, 0, 1, 3)
    return result.reshape(num_queries, num_heads, head_dim)


def _read(layer: KVLayer, block_table: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Keys and values of the positions first … end - 1, [2, kv_heads, end - first, head_dim]."""
    first_block = first // layer.block_size
    block_ids = block_table[first_block : -(-end // layer.block_size)]
    kept = slice(first - first_block * layer.block_size, end - first_block * layer.block_size)
    if layer.data.itemsize > 1:
        # Whole blocks are copied faster than slots.
        return layer.data.index_select(1, block_ids).flatten(1, 2)[:, kept].transpose(1, 2)
    offsets = torch.arange(layer.block_size)
    slots = (block_ids[:, None].long() * layer.block_size + offsets).flatten()[kept]
    return torch.stack(layer.read(slots)).transpose(1, 2)


def _mask(
    num_queries: int, num_keys: int, num_older: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """[queries, keys], 0 where a query sees a key, else -inf.

    Args:
        num_older: Keys before the first query's own.
    """
    mask = torch.full((num_queries, num_keys), -torch.inf, dtype=dtype)
    later = mask.triu(num_older + 1)
    return later if window is None else later + mask.tril_(num_older - window)
