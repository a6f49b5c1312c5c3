"""Paged attention on a CPU over a flat batch, in C: kernels/cpu/attention.c says how.

What a token gets is the same to the bit in any chunk of its prompt and as a decode, for every instruction set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels import cpu
from engine.kernels.attention.kv_layer import KVLayer
from engine.kernels.attention.plan import AttentionPlan

SEGMENT = 256
"""Keys with a softmax of their own, counted from position 0. Part of the operation: it changes bits."""

MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True)
class CpuPlan(AttentionPlan):
    """Which queries and keys attention reads, and its scratch; the tensors may be longer than a step's sequences.

    Attributes:
        num_sequences: [1] int64, S.
        partial_starts: [S] int32, where the segments of a sequence that decodes begin in `partials`.
        partials: [segments, heads, head_dim + 2] float32, scratch.
        groups, members, num_groups: [segments, 3] int32, [segments] int32, [1] int64, written by `group_segments`.
    """

    num_sequences: torch.Tensor
    partial_starts: torch.Tensor
    partials: torch.Tensor
    groups: torch.Tensor
    members: torch.Tensor
    num_groups: torch.Tensor

    @staticmethod
    def make(
        *,
        num_sequences: torch.Tensor,
        query_starts: torch.Tensor,
        starts: torch.Tensor,
        table_rows: torch.Tensor,
        block_tables: torch.Tensor,
        partial_starts: torch.Tensor,
        max_segments: int,
        num_heads: int,
        head_dim: int,
    ) -> CpuPlan:
        """A plan with scratch for decodes over `max_segments` segments in all."""
        return CpuPlan(
            num_sequences=num_sequences,
            query_starts=query_starts,
            starts=starts,
            table_rows=table_rows,
            block_tables=block_tables,
            partial_starts=partial_starts,
            partials=torch.empty(max_segments, num_heads, head_dim + 2),
            groups=torch.zeros(max_segments, 3, dtype=torch.int32),
            members=torch.zeros(max_segments, dtype=torch.int32),
            num_groups=torch.zeros(1, dtype=torch.int64),
        )


def group_segments(plan: CpuPlan, block_size: int) -> None:
    """Finds the sequences that decode over the same blocks of a segment, which are then read once for all of them.

    Once a step, before its first `cpu_attention`.
    """
    cpu.run(
        "group_segments",
        plan.num_sequences,
        query_starts=plan.query_starts,
        starts=plan.starts,
        table_rows=plan.table_rows,
        tables=plan.block_tables,
        table_stride=plan.block_tables.stride(0),
        block_size=block_size,
        groups=plan.groups,
        members=plan.members,
        num_groups=plan.num_groups,
    )


def cpu_attention(
    queries: torch.Tensor, layer: KVLayer, plan: CpuPlan, scale: float, window: int | None
) -> torch.Tensor:
    """Causal attention of each sequence's queries over its own keys, which are in the cache already.

    Args:
        queries: [T, heads, head_dim] float32; tokens may be apart in memory.
        window: Keys that a query sees, its own among them; None for all.

    Returns:
        [T, heads * head_dim] float32.
    """
    num_tokens, num_heads, head_dim = queries.shape
    assert head_dim <= MAX_HEAD_DIM
    num_kv_heads = layer.data.shape[3]
    group = num_heads // num_kv_heads
    output = cpu.empty("paged_attention", num_tokens, num_heads * head_dim)
    cpu.run(
        "paged_attention",
        plan.num_sequences,
        queries=queries,
        query_stride=queries.stride(0),
        query_starts=plan.query_starts,
        starts=plan.starts,
        table_rows=plan.table_rows,
        tables=plan.block_tables,
        table_stride=plan.block_tables.stride(0),
        keys=layer.keys,
        values=layer.values,
        key_scales=layer.key_scales,
        value_scales=layer.value_scales,
        cache_type=layer.type_number,
        num_kv_heads=num_kv_heads,
        heads_per_kv_head=group,
        head_dim=head_dim,
        block_size=layer.block_size,
        scale=scale,
        window=window or 0,
        output=output,
        partial_starts=plan.partial_starts,
        partials=plan.partials,
        groups=plan.groups,
        members=plan.members,
        num_groups=plan.num_groups,
    )
    cpu.run(
        "merge_segments",
        plan.num_sequences,
        query_starts=plan.query_starts,
        starts=plan.starts,
        num_kv_heads=num_kv_heads,
        heads_per_kv_head=group,
        head_dim=head_dim,
        window=window or 0,
        output=output,
        partial_starts=plan.partial_starts,
        partials=plan.partials,
    )
    return output


def gather(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [M] int32 of x [T, H] float32 → [M, H]."""
    y = cpu.empty("gather", rows.shape[0], x.shape[1])
    cpu.run("gather", rows.shape[0], x=x, indices=rows, size=x.shape[1], output=y)
    return y
