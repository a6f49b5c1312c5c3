"""Paged attention over a flat batch: each sequence brings 1 … n query tokens.

Keys and values are read as stored in the cache, those of the step itself too, so that a token cannot tell in
which chunk its prompt arrived. A sequence is computed by itself: what is beside it in the batch does not enter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.batch import BatchRow
from engine.kv_cache import NULL_BLOCK


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Which keys one sequence's queries read.

    Attributes:
        first, last: The queries are rows first … last - 1 of the flat batch.
        block_ids: [blocks] int64, the blocks that hold the keys.
        num_skipped: Keys at the start of the first block that no query sees.
        num_keys: Keys after those.
        mask: [queries, keys] float, 0 or -inf; None where every query sees every key.
    """

    first: int
    last: int
    block_ids: torch.Tensor
    num_skipped: int
    num_keys: int
    mask: torch.Tensor | None


def slot_mapping(rows: Sequence[BatchRow], block_size: int, device: torch.device) -> torch.Tensor:
    """Where each token's key and value go, [T] int64; tokens that are stored already go to the null block."""
    slots: list[int] = []
    for row in rows:
        for position in range(row.start, row.start + len(row.token_ids)):
            block_id = row.block_table[position // block_size]
            if position < row.num_stored_tokens:
                block_id = NULL_BLOCK
            slots.append(block_id * block_size + position % block_size)
    return torch.tensor(slots, device=device)


def plan_attention(
    rows: Sequence[BatchRow], block_size: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> list[RowPlan]:
    """One RowPlan a row, for layers that see `window` tokens back (None: all)."""
    plans = []
    first = 0
    for row in rows:
        num_queries = len(row.token_ids)
        end = row.start + num_queries
        oldest = 0 if window is None else max(0, row.start - window + 1)
        first_block = oldest // block_size
        block_ids = row.block_table[first_block : -(-end // block_size)]
        mask = None
        if num_queries > 1:
            queries = torch.arange(row.start, end, device=device)[:, None]
            keys = torch.arange(oldest, end, device=device)
            hidden = keys > queries
            if window is not None:
                hidden |= keys <= queries - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        plans.append(
            RowPlan(
                first=first,
                last=first + num_queries,
                block_ids=torch.tensor(block_ids, device=device),
                num_skipped=oldest - first_block * block_size,
                num_keys=end - oldest,
                mask=mask,
            )
        )
        first += num_queries
    return plans


def write_kv(cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """Stores keys and values, [T, kv_heads, head_dim] each, in the cache's slots [T].

    Args:
        cache: [2, blocks, block_size, kv_heads, head_dim], keys then values.
    """
    flat = cache.flatten(1, 2)
    flat[0].index_copy_(0, slots, keys.to(cache.dtype))
    flat[1].index_copy_(0, slots, values.to(cache.dtype))


def paged_attention(
    queries: torch.Tensor, cache: torch.Tensor, plans: list[RowPlan], scale: float
) -> torch.Tensor:
    """Causal attention of each row's queries over its own keys.

    Args:
        queries: [T, heads, head_dim].
        cache: [2, blocks, block_size, kv_heads, head_dim].
        scale: Factor of the products before the softmax.

    Returns:
        [T, heads * head_dim] of the queries' dtype.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = cache.shape[3]
    group = num_heads // num_kv_heads
    output = torch.empty_like(queries)
    for plan in plans:
        num_queries = plan.last - plan.first
        keys, values = (
            half.index_select(0, plan.block_ids)
            .flatten(0, 1)[plan.num_skipped : plan.num_skipped + plan.num_keys]
            .to(queries.dtype)
            .transpose(0, 1)[None]
            for half in cache
        )
        # The query heads that share a key head become more query rows of it: [1, kv_heads, group * queries, D].
        folded = queries[plan.first : plan.last].view(num_queries, num_kv_heads, group, head_dim)
        folded = folded.permute(1, 2, 0, 3).reshape(1, num_kv_heads, group * num_queries, head_dim)
        mask = None if plan.mask is None else plan.mask.repeat(group, 1)
        result = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
        result = result.view(num_kv_heads, group, num_queries, head_dim).permute(2, 0, 1, 3)
        output[plan.first : plan.last] = result.reshape(num_queries, num_heads, head_dim)
    return output.view(num_tokens, num_heads * head_dim)


def reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Attention of one sequence, written out: queries [Q, heads, D] at positions start …, keys [L, kv_heads, D].

    Returns:
        [Q, heads * D] float32.
    """
    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries.float(), keys) * scale
    distance = torch.arange(start, start + len(queries))[:, None] - torch.arange(len(keys))
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
