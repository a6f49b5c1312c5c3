"""Sequences in a paged cache, to check and time attention with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.kernels.attention.dispatch import paged_attention, reference
from engine.kernels.attention.in_triton import (
    FormName,
    TritonPlan,
    WorkList,
    form,
    make_scratch,
    plan_items,
    scratch_capacity,
)
from engine.kernels.attention.kv_layer import KVLayer
from engine.kernels.launch import target_of

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a model, and the types of its activations and its cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    cache_dtype: torch.dtype

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class Sequences:
    """A flat batch.

    Attributes:
        lengths: (position of the first query, queries) of each sequence.
        queries: [T, heads, head_dim].
        tables: [S, blocks] int32.
    """

    lengths: Sequence[tuple[int, int]]
    heads: Heads
    queries: torch.Tensor
    layer: KVLayer
    tables: torch.Tensor

    def pick(self, index: int, first: int = 0, last: int | None = None) -> Sequences:
        """One sequence alone, or queries first … last - 1 of it."""
        start, count = self.lengths[index]
        last = count if last is None else last
        row = sum(count for _, count in self.lengths[:index])
        return Sequences(
            [(start + first, last - first)],
            self.heads,
            self.queries[row + first : row + last],
            self.layer,
            self.tables[index : index + 1],
        )


def make_layer(num_blocks: int, heads: Heads, device: torch.device, is_filled: bool = False) -> KVLayer:
    """A layer's cache; unless filled with random numbers, with what must not be read: NaN."""
    shape = (2, num_blocks, BLOCK_SIZE, heads.num_kv_heads)
    if heads.cache_dtype == torch.int8:
        data = torch.randint(-127, 128, (*shape, heads.head_dim), dtype=torch.int8, device=device)
        return KVLayer(data, torch.full(shape, 0.01 if is_filled else torch.nan, device=device))
    data = torch.empty(*shape, heads.head_dim, dtype=heads.cache_dtype, device=device)
    for block in range(0, num_blocks, 4096):  # in parts: random numbers are made in float32
        part = data[:, block : block + 4096]
        nothing = torch.full(part.shape, torch.nan, device=device)
        part.copy_(torch.randn(part.shape, device=device) if is_filled else nothing)
    return KVLayer(data)


def make_tables(lengths: Sequence[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, int]:
    """Block tables [S, blocks] int32 with blocks in random order from 1 on, and how many blocks there are."""
    counts = [-(-(start + count) // BLOCK_SIZE) for start, count in lengths]
    tables = np.zeros((len(counts), max(counts)), np.int32)
    order = np.random.default_rng().permutation(sum(counts)) + 1
    for row, part in zip(tables, np.split(order, np.cumsum(counts)[:-1]), strict=True):
        row[: len(part)] = part
    return torch.from_numpy(tables).to(device), sum(counts) + 1


def make_sequences(lengths: Sequence[tuple[int, int]], heads: Heads, device: torch.device) -> Sequences:
    """Sequences whose keys and values, within [-4, 4], are written to the cache."""
    tables, num_blocks = make_tables(lengths, device)
    layer = make_layer(num_blocks, heads, device)
    for table, (start, count) in zip(tables, lengths, strict=True):
        positions = torch.arange(start + count, device=device)
        slots = table[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        shape = (2, start + count, heads.num_kv_heads, heads.head_dim)
        keys, values = torch.randn(shape, device=device).clamp_(-4, 4)
        layer.write(slots, keys, values)
    num_tokens = sum(count for _, count in lengths)
    queries = torch.randn(num_tokens, heads.num_heads, heads.head_dim, device=device).to(heads.dtype)
    return Sequences(lengths, heads, queries, layer, tables)


def make_plan(sequences: Sequences, window: int | None = None, batch_invariant: bool = False) -> TritonPlan:
    """The plan of a launch, as the engine makes it."""
    heads, device = sequences.heads, sequences.queries.device
    starts, counts = (np.array(column) for column in zip(*sequences.lengths, strict=True))
    longest, group = int((starts + counts).max()), heads.num_heads // heads.num_kv_heads
    capacity = scratch_capacity(int((starts + counts).sum()), len(starts), longest, group)

    def work(name: FormName, query_lens: np.ndarray) -> WorkList | None:
        target = target_of(sequences.queries)
        assert target is not None
        if not query_lens.any():
            return None
        shape = (heads.dtype, heads.cache_dtype, heads.num_heads, heads.num_kv_heads, heads.head_dim)
        chosen = form(target, name, *shape)
        items = plan_items(query_lens, starts, window, group, chosen.block_q, chosen.num_programs, capacity)
        count = torch.tensor([len(items)], dtype=torch.int32)
        return WorkList(torch.from_numpy(items).to(device), count.to(device))

    if batch_invariant:
        decode, prefill = work("batch_invariant", counts), None
    else:
        is_decode = counts <= _largest_decode(sequences)
        decode = work("decode", np.where(is_decode, counts, 0))
        prefill = work("prefill", np.where(is_decode, 0, counts))
    query_starts = torch.from_numpy(np.append(0, np.cumsum(counts)).astype(np.int32))
    return TritonPlan(
        query_starts.to(device),
        torch.from_numpy(starts.astype(np.int32)).to(device),
        torch.arange(len(starts), dtype=torch.int32, device=device),
        sequences.tables,
        decode,
        prefill,
        make_scratch(capacity, heads.num_kv_heads, heads.head_dim, device),
    )


def _largest_decode(sequences: Sequences) -> int:
    target, heads = target_of(sequences.queries), sequences.heads
    assert target is not None
    shape = (heads.dtype, heads.cache_dtype, heads.num_heads, heads.num_kv_heads, heads.head_dim)
    return form(target, "decode", *shape).block_q


def attend(
    sequences: Sequences, window: int | None = None, soft_cap: float = 0.0, batch_invariant: bool = False
) -> torch.Tensor:
    """Paged attention of the batch, [T, heads * head_dim]."""
    plan = make_plan(sequences, window, batch_invariant)
    scale = sequences.heads.scale
    output = paged_attention(
        sequences.queries, sequences.layer, plan, scale, window, soft_cap, batch_invariant
    )
    assert not plan.scratch.counters.any(), "counters are not zero after the launch"
    return output


def expect(sequences: Sequences, window: int | None = None, soft_cap: float = 0.0) -> torch.Tensor:
    """Attention written out, [T, heads * head_dim] float32."""
    outputs, row = [], 0
    for table, (start, count) in zip(sequences.tables, sequences.lengths, strict=True):
        queries = sequences.queries[row : row + count]
        scale = sequences.heads.scale
        outputs.append(reference(queries, sequences.layer, table, start, scale, window, soft_cap))
        row += count
    return torch.cat(outputs)
