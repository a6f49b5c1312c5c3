"""Paged attention: each sequence of a flat batch brings 1 … n query tokens."""

from __future__ import annotations

import torch

from engine.kernels.attention.in_c import CpuPlan, cpu_attention
from engine.kernels.attention.in_torch import torch_attention
from engine.kernels.attention.kv_layer import KVLayer
from engine.kernels.attention.plan import AttentionPlan


def paged_attention(
    queries: torch.Tensor,
    layer: KVLayer,
    plan: AttentionPlan,
    scale: float,
    window: int | None = None,
    soft_cap: float = 0.0,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Causal attention of each sequence's queries over its own keys, which are in the cache already.

    The body is the one that the plan was made for: a `TritonPlan` has its work lists, a `CpuPlan` the scratch of
    the C body; a plain `AttentionPlan` is run by torch's operators.

    Args:
        queries: [T, heads, head_dim] float; for Triton contiguous, for C float32.
        scale: Factor of the products before the softmax.
        window: Keys that a query sees, its own among them; None for all.
        soft_cap: Scores become soft_cap * tanh(scores / soft_cap); 0 leaves them. Only Triton has others than 0.
        batch_invariant: For Triton: both lists run in the form "batch_invariant", for which they must have been
            planned.

    Returns:
        [T, heads * head_dim] of the queries' dtype. Rows of sequences without an item are not written.

    Raises:
        ValueError: More query heads share a key head than an item of Triton's has rows.
    """
    if isinstance(plan, CpuPlan):
        assert not soft_cap
        return cpu_attention(queries, layer, plan, scale, window)
    if type(plan) is AttentionPlan:
        assert not soft_cap
        return torch_attention(queries, layer, plan, scale, window)
    from engine.kernels.attention.in_triton import TritonPlan, triton_attention

    assert isinstance(plan, TritonPlan)
    return triton_attention(queries, layer, plan, scale, window, soft_cap, batch_invariant)


def reference(
    queries: torch.Tensor,
    layer: KVLayer,
    block_table: torch.Tensor,
    start: int,
    scale: float,
    window: int | None = None,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Attention of one sequence, written out: queries [Q, heads, D] at positions start …, block_table [W].

    Returns:
        [Q, heads * D] float32.
    """
    positions = torch.arange(start + len(queries), device=queries.device)
    slots = (
        block_table.long()[positions // layer.block_size] * layer.block_size + positions % layer.block_size
    )
    group = queries.shape[1] // layer.data.shape[3]
    keys, values = (x.repeat_interleave(group, dim=1) for x in layer.read(slots))
    scores = torch.einsum("qhd,khd->hqk", queries.float(), keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    distance = positions[start:, None] - positions
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
