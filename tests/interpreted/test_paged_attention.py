"""Paged attention against attention written out, and what must be equal to the bit: split or not, alone or in a
batch, whole or in chunks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from engine.kernels.attention.dispatch import paged_attention, reference
from engine.kernels.attention.in_triton import (
    SEGMENT,
    AttentionForm,
    FormName,
    TritonPlan,
    WorkList,
    form,
    make_scratch,
    plan_items,
    scratch_capacity,
)
from engine.kernels.attention.kv_layer import INT4, KVCache, KVLayer
from engine.kernels.launch import INTERPRETER

CAPACITY = 512


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Sequences:
    """Sequences of a flat batch with their keys in a cache, which holds NaN wherever nothing was written.

    Attributes:
        lengths: (position of the first query, queries) of each.
    """

    lengths: list[tuple[int, int]]
    shape: Shape
    queries: torch.Tensor
    layer: KVLayer
    tables: torch.Tensor

    def starts_of_queries(self) -> np.ndarray:
        return np.cumsum([0] + [size for _, size in self.lengths])


def make_sequences(lengths: list[tuple[int, int]], shape: Shape) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-(start + size) // shape.block_size) for start, size in lengths]
    order = (torch.randperm(sum(blocks), generator=generator) + 1).to(torch.int32)
    tables = torch.zeros(len(lengths), max(blocks) + 1, dtype=torch.int32)
    for row, part in zip(tables, order.split(blocks), strict=True):
        row[: len(part)] = part
    heads = (shape.num_kv_heads, shape.head_dim, shape.cache_dtype)
    cache = KVCache.allocate(1, sum(blocks) + 1, shape.block_size, *heads, torch.device("cpu"))
    if cache.scales is None:
        cache.data.copy_(torch.full(cache.data.shape, torch.nan))
    else:
        cache.data.fill_(127)
        cache.scales.fill_(torch.nan)
    layer = cache.layer(0)
    for row, (start, count) in zip(tables, lengths, strict=True):
        positions = torch.arange(start + count)
        slots = row[positions // shape.block_size] * shape.block_size + positions % shape.block_size
        keys, values = torch.randn(2, start + count, shape.num_kv_heads, shape.head_dim, generator=generator)
        layer.write(slots, keys, values)
    num_tokens = sum(size for _, size in lengths)
    queries = torch.randn(num_tokens, shape.num_heads, shape.head_dim, generator=generator).to(shape.dtype)
    return Sequences(lengths, shape, queries, layer, tables)


def form_of(shape: Shape, name: FormName) -> AttentionForm:
    return form(
        INTERPRETER,
        name,
        shape.dtype,
        shape.cache_dtype,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
    )


def make_list(
    query_lens: np.ndarray,
    starts: np.ndarray,
    window: int | None,
    shape: Shape,
    name: FormName,
    capacity: int,
) -> WorkList | None:
    chosen = form_of(shape, name)
    group = shape.num_heads // shape.num_kv_heads
    items = plan_items(query_lens, starts, window, group, chosen.block_q, chosen.num_programs, capacity)
    # Rows beyond the list's end are not read.
    padded = np.concatenate((items, np.full((3, 5), 10**6, np.int32)))
    return WorkList(torch.from_numpy(padded), torch.tensor([len(items)], dtype=torch.int32))


def attend(
    sequences: Sequences,
    window: int | None = None,
    soft_cap: float = 0.0,
    batch_invariant: bool = False,
    capacity: int = CAPACITY,
) -> torch.Tensor:
    shape = sequences.shape
    query_lens = np.array([size for _, size in sequences.lengths])
    starts = np.array([start for start, _ in sequences.lengths])
    if batch_invariant:
        lists = (None, make_list(query_lens, starts, window, shape, "batch_invariant", capacity))
    else:
        is_decode = query_lens <= form_of(shape, "decode").block_q
        lists = tuple(
            make_list(np.where(chosen, query_lens, 0), starts, window, shape, name, capacity)
            for name, chosen in (("decode", is_decode), ("prefill", ~is_decode))
        )
    plan = TritonPlan(
        torch.from_numpy(sequences.starts_of_queries()).to(torch.int32),
        torch.from_numpy(starts).to(torch.int32),
        torch.arange(len(starts), dtype=torch.int32),
        sequences.tables,
        *lists,
        make_scratch(capacity, shape.num_kv_heads, shape.head_dim, torch.device("cpu")),
    )
    output = paged_attention(sequences.queries, sequences.layer, plan, 0.2, window, soft_cap, batch_invariant)
    assert not plan.scratch.counters.any()
    return output


def expect(sequences: Sequences, window: int | None = None, soft_cap: float = 0.0) -> torch.Tensor:
    rows = sequences.starts_of_queries()
    return torch.cat(
        [
            reference(sequences.queries[first:last], sequences.layer, table, start, 0.2, window, soft_cap)
            for first, last, table, (start, _) in zip(
                rows[:-1], rows[1:], sequences.tables, sequences.lengths, strict=True
            )
        ]
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """The interpreter multiplies in float32 (16-bit operands are exact in it), so what differs is the order of at
    most a few thousand terms, each off by 2**-24 of weights that sum to 1 and values below 5, and the output's
    rounding."""
    atol = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(actual.float(), expected, atol=atol, rtol=atol)


# A decode in its first block, chunks, a fresh prompt, one token alone, decodes and a chunk over some segments,
# an empty slot.
LENGTHS = [(5, 1), (11, 7), (0, 20), (0, 1), (600, 1), (0, 0), (505, 9)]


@pytest.mark.parametrize(
    ("shape", "window", "soft_cap", "batch_invariant"),
    [
        (Shape(2, 2, 64), None, 0.0, False),
        (Shape(3, 1, 80, block_size=1), 7, 0.0, False),
        (Shape(3, 1, 80, 64, torch.float16, torch.float16), None, 0.0, False),
        (Shape(4, 1, 96, 64, torch.float16, torch.float16), None, 3.0, True),
        (Shape(8, 1, 128, 16, torch.bfloat16, torch.bfloat16), 600, 0.0, False),
        (Shape(2, 2, 256, 16, torch.float16, torch.float16), 1, 5.0, True),
        (Shape(4, 1, 24, 16, torch.float16, torch.int8), None, 0.0, False),
        (Shape(8, 2, 64, 4, torch.bfloat16, torch.int8), 33, 2.0, True),
        (Shape(3, 1, 64, 16, torch.float16, torch.float8_e4m3fn), None, 0.0, True),
        (Shape(4, 2, 16, 16, torch.float32, torch.int8), 513, 0.0, False),
        (Shape(4, 2, 16, 16, torch.float32, INT4), 513, 0.0, False),
        (Shape(3, 1, 80, 4, torch.float32, INT4), None, 0.0, False),
        (Shape(8, 2, 64, 16, torch.float16, INT4), 33, 2.0, True),
        (Shape(2, 2, 256, 16, torch.float16, INT4), None, 0.0, False),
    ],
    ids=str,
)
def test_equals_the_reference(
    shape: Shape, window: int | None, soft_cap: float, batch_invariant: bool
) -> None:
    sequences = make_sequences(LENGTHS, shape)
    output = attend(sequences, window, soft_cap, batch_invariant)
    assert_close(output, expect(sequences, window, soft_cap), shape.dtype)


@pytest.mark.parametrize(
    ("dtype", "window", "batch_invariant"),
    [
        # Outputs in float32 show what those in 16 bits would round away.
        (torch.float32, None, False),
        (torch.float32, 1200, False),
        (torch.float16, 1200, False),
        (torch.float16, None, True),
    ],
)
def test_split_equals_unsplit(dtype: torch.dtype, window: int | None, batch_invariant: bool) -> None:
    shape = Shape(4, 1, 16, dtype=dtype, cache_dtype=torch.float16)
    sequences = make_sequences([(1500, 1), (3, 1), (1100, 5), (530, 2)], shape)
    chosen = form_of(shape, "batch_invariant" if batch_invariant else "decode")
    arguments = (np.array([1, 1, 0, 2]), np.array([1500, 3, 0, 530]), window, 4, chosen.block_q)
    assert (plan_items(*arguments, chosen.num_programs, CAPACITY)[:, 4] >= 0).any()
    assert (plan_items(*arguments, chosen.num_programs, 0)[:, 4] == -1).all()
    split = attend(sequences, window, batch_invariant=batch_invariant)
    unsplit = attend(sequences, window, batch_invariant=batch_invariant, capacity=0)
    assert torch.equal(split, unsplit)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_row_does_not_depend_on_the_batch(batch_invariant: bool) -> None:
    sequences = make_sequences([(37, 1), (0, 20), (520, 3)], Shape(3, 1, 16))
    together = attend(sequences, batch_invariant=batch_invariant)
    rows = sequences.starts_of_queries()
    for i, (first, last) in enumerate(pairwise(rows)):
        alone = replace(
            sequences,
            lengths=sequences.lengths[i : i + 1],
            queries=sequences.queries[first:last],
            tables=sequences.tables[i : i + 1],
        )
        assert torch.equal(attend(alone, batch_invariant=batch_invariant), together[first:last])


@pytest.mark.parametrize(("window", "cache_dtype"), [(None, torch.int8), (100, torch.float16), (None, INT4)])
def test_chunks_equal_the_whole_when_batch_invariant(window: int | None, cache_dtype: torch.dtype) -> None:
    shape = Shape(4, 2, 16, dtype=torch.float16, cache_dtype=cache_dtype)
    sequences = make_sequences([(470, 90)], shape)
    whole = attend(sequences, window, batch_invariant=True)
    for first, last in [(0, 1), (7, 39), (39, 40), (41, 44), (60, 90)]:
        chunk = replace(
            sequences, lengths=[(470 + first, last - first)], queries=sequences.queries[first:last]
        )
        assert torch.equal(attend(chunk, window, batch_invariant=True), whole[first:last])


def test_the_plan_covers_every_query_and_segment_once() -> None:
    generator = np.random.default_rng(0)
    for window in (None, 3000):
        query_lens = np.append(generator.integers(0, 9, 40), [300, 64, 65])
        starts = generator.integers(0, 900, 43)
        starts[:5], query_lens[:5] = 20_000, 3
        capacity = 1200
        items = plan_items(query_lens, starts, window, 4, 32, 40, capacity)
        seen = set()
        used = np.zeros(capacity, int)
        for sequence, tile, first, last, partial in items.tolist():
            last_query = min((tile + 1) * 32, query_lens[sequence]) - 1
            oldest = 0 if window is None else max(0, starts[sequence] + tile * 32 - window + 1)
            segments = range(oldest // SEGMENT, (starts[sequence] + last_query) // SEGMENT + 1)
            if partial < 0:
                assert (first, last) == (segments.start, segments.stop)
            else:
                assert last == first + 1
                assert query_lens[sequence] <= 32
                rows = 4 * query_lens[sequence]
                place = partial + (first - segments.start) * rows
                used[place : place + rows] += 1
                assert place + rows <= capacity
            seen |= {(sequence, tile, segment) for segment in range(first, last)}
            assert first in segments
            assert last - 1 in segments
        assert used.max() == 1
        expected = sum(
            (starts[s] + min((t + 1) * 32, query_lens[s]) - 1) // SEGMENT
            - (0 if window is None else max(0, starts[s] + t * 32 - window + 1) // SEGMENT)
            + 1
            for s in range(43)
            for t in range(-(-query_lens[s] // 32))
        )
        assert len(seen) == expected == (items[:, 3] - items[:, 2]).sum()


def test_programs_end_together() -> None:
    """One long sequence among short ones is split; equal ones that fill the programs are not."""
    arguments = (None, 4, 4, 33, scratch_capacity(10**6, 256, 2**17, 4))
    long = plan_items(np.ones(17, int), np.array([100_000] + [500] * 16), *arguments)
    loads = np.bincount(np.arange(len(long)) % 33, long[:, 3] - long[:, 2], minlength=33)
    assert loads.max() <= np.ceil(loads.mean())
    equal = plan_items(np.ones(33, int), np.full(33, 8000), *arguments)
    assert (equal[:, 4] == -1).all()


def test_too_many_heads_for_a_key_head() -> None:
    with pytest.raises(ValueError, match="64 heads share 1 key heads"):
        form_of(Shape(64, 1, 64, dtype=torch.float16, cache_dtype=torch.float16), "decode")
