"""Paged attention with torch's operators, over a flat batch: each sequence brings 1 … n query tokens.

Keys and values are read as stored in the cache, those of the step itself too, so that a token cannot tell in
which chunk its prompt arrived. A sequence is computed by itself: what is beside it in the batch does not enter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.core.batch import BatchRow
from engine.core.kv_cache import NULL_BLOCK
from engine.kernels.attention.kv_layer import KVLayer
from engine.kernels.rotary import apply_rotary


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


def slot_mapping(rows: Sequence[BatchRow], block_size: int) -> torch.Tensor:
    """Where each token's key and value go, [T] int64; tokens that are stored already go to the null block."""
    slots: list[int] = []
    for row in rows:
        for position in range(row.start, row.start + len(row.token_ids)):
            block_id = row.block_table[position // block_size]
            if position < row.num_stored_tokens:
                block_id = NULL_BLOCK
            slots.append(block_id * block_size + position % block_size)
    return torch.tensor(slots)


def plan_attention(
    rows: Sequence[BatchRow], layer: KVLayer, window: int | None, dtype: torch.dtype
) -> list[RowPlan]:
    """Plans attention for the layers that see `window` tokens back (None: all).

    Args:
        layer: The cache of any layer.
        dtype: The activations'.
    """
    plans = []
    first = 0
    for row in rows:
        plans.append(_plan_row(row, first, layer.block_size, window, dtype))
        first += len(row.token_ids)
    return plans


def _plan_row(row: BatchRow, first: int, block_size: int, window: int | None, dtype: torch.dtype) -> RowPlan:
    num_queries = len(row.token_ids)
    end = row.start + num_queries
    oldest = _oldest_key(row, window)
    first_block = oldest // block_size
    mask = None
    if num_queries > 1:
        queries = torch.arange(row.start, end)[:, None]
        keys = torch.arange(oldest, end)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return RowPlan(
        first=first,
        last=first + num_queries,
        block_ids=torch.tensor(row.block_table[first_block : -(-end // block_size)]),
        num_skipped=oldest - first_block * block_size,
        num_keys=end - oldest,
        mask=mask,
    )


def _oldest_key(row: BatchRow, window: int | None) -> int:
    """Position of the oldest key that the row's first query sees."""
    return 0 if window is None else max(0, row.start - window + 1)


def rotate_and_write(
    heads: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    layer: KVLayer,
    slots: torch.Tensor,
    num_kv_heads: int,
) -> torch.Tensor:
    """Rotates queries and keys by their positions and stores keys and values in the cache.

    Args:
        heads: [T, query heads + 2 * num_kv_heads, head_dim]: queries, keys, values.
        cosine, sine: [T, 1, head_dim], as for `apply_rotary`.
        slots: [T] int64.

    Returns:
        The rotated queries, [T, query heads, head_dim].
    """
    num_heads = heads.shape[1] - 2 * num_kv_heads
    rotated = apply_rotary(heads[:, :-num_kv_heads], cosine, sine)
    layer.write(slots, rotated[:, num_heads:], heads[:, -num_kv_heads:])
    return rotated[:, :num_heads]


def _read_keys_and_values(
    layer: KVLayer, plan: RowPlan, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """[keys, kv_heads, head_dim] each."""
    kept = slice(plan.num_skipped, plan.num_skipped + plan.num_keys)
    if layer.data.itemsize > 1:
        # Whole blocks are copied faster than slots.
        keys, values = (half.index_select(0, plan.block_ids).flatten(0, 1)[kept] for half in layer.data)
    else:
        offsets = torch.arange(layer.block_size)
        keys, values = layer.read((plan.block_ids[:, None] * layer.block_size + offsets).flatten()[kept])
    return keys.to(dtype), values.to(dtype)


def paged_attention(
    queries: torch.Tensor, layer: KVLayer, plans: list[RowPlan], scale: float
) -> torch.Tensor:
    """Causal attention of each row's queries over its own keys.

    Args:
        queries: [T, heads, head_dim].
        scale: Factor of the products before the softmax.

    Returns:
        [T, heads * head_dim] of the queries' dtype.
    """
    output = queries.new_empty(queries.shape)
    for plan in plans:
        _attend_row(queries, layer, plan, scale, output)
    return output.flatten(1)


def _attend_row(
    queries: torch.Tensor, layer: KVLayer, plan: RowPlan, scale: float, output: torch.Tensor
) -> None:
    (_, num_heads, head_dim), num_kv_heads = queries.shape, layer.data.shape[3]
    num_queries, group = plan.last - plan.first, num_heads // num_kv_heads
    keys, values = (x.transpose(0, 1)[None] for x in _read_keys_and_values(layer, plan, queries.dtype))
    # The query heads that share a key head become more query rows of it: [1, kv_heads, group * queries, D].
    folded = queries[plan.first : plan.last].view(num_queries, num_kv_heads, group, head_dim)
    folded = folded.permute(1, 2, 0, 3).reshape(1, num_kv_heads, group * num_queries, head_dim)
    mask = None if plan.mask is None else plan.mask.repeat(group, 1)
    result = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    result = result.view(num_kv_heads, group, num_queries, head_dim).permute(2, 0, 1, 3)
    output[plan.first : plan.last] = result.reshape(num_queries, num_heads, head_dim)


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
