"""Paged attention on a GPU over a flat batch: each sequence brings 1 … n query tokens.

Flash attention (Dao et al. 2022; Milakov and Gimelshein 2018 for the online softmax) over keys gathered through
block tables. A fixed grid of programs works off a list of items, so that a CUDA graph serves any lengths. The
keys of a sequence are cut into segments of SEGMENT positions, counted from position 0; each segment has a
softmax of its own, and segments are merged in order. An item takes all segments of its queries, or one segment,
whose state it writes to memory for the last item of the group to merge with the others (as in stream-K, Osama
et al. 2023). Both ways do the same arithmetic in the same order: their results are equal to the bit.

Keys and values are read as stored in the cache, those of the step itself too.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import triton
import triton.language as tl

from engine.kernels.attention.kv_layer import INT4_GROUP, KVLayer
from engine.kernels.attention.plan import AttentionPlan
from engine.kernels.launch import Target, Tile, launch, select_tile, target_of

SEGMENT = 512
"""Keys with a softmax of their own, counted from position 0. Part of the operation: it changes bits."""

ITEM_WORDS = 5
"""Words of an item: sequence, query tile, first segment, last segment, first row in the scratch."""

_ITEM_WORDS = tl.constexpr(ITEM_WORDS)

_LOG2_E = tl.constexpr(1.4426950408889634)
_INT4_GROUP = tl.constexpr(INT4_GROUP)


@triton.jit
def _rescaled(maximum, new_maximum):
    """The factor of what was summed under `maximum`; 0 while nothing was."""
    return tl.exp2(maximum - tl.where(new_maximum == -float("inf"), 0.0, new_maximum))


@triton.jit
def _merge(total, total_sum, total_maximum, part, part_sum, part_maximum):
    """The state of two softmaxes as one: weighted values [M, D], sums and maxima of the weights [M]."""
    maximum = tl.maximum(total_maximum, part_maximum)
    total_factor = _rescaled(total_maximum, maximum)
    part_factor = _rescaled(part_maximum, maximum)
    total = total * total_factor[:, None] + part * part_factor[:, None]
    return total, total_sum * total_factor + part_sum * part_factor, maximum


@triton.jit
def _load_int4(vectors, scales, slot, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors of four bits at some slots [K] → [K, BLOCK_D] float32; beyond HEAD_DIM anything finite."""
    BYTES: tl.constexpr = HEAD_DIM // 2
    WIDTH: tl.constexpr = _INT4_GROUP if BLOCK_D > _INT4_GROUP else BLOCK_D
    BLOCK_G: tl.constexpr = BLOCK_D // WIDTH
    GROUPS: tl.constexpr = (HEAD_DIM + WIDTH - 1) // WIDTH
    # Beyond the vector its beginning is read again: masks would take registers.
    places, groups = tl.arange(0, BLOCK_D // 2) % BYTES, tl.arange(0, BLOCK_G) % GROUPS
    pairs = tl.load(vectors + slot[:, None] * BYTES + places[None, :])
    codes = tl.interleave(pairs & 15, pairs >> 4)
    own_scales = scales + (slot[:, None] * GROUPS + groups[None, :]) * 2
    scale, minimum = tl.load(own_scales).to(tl.float32), tl.load(own_scales + 1).to(tl.float32)
    grouped = tl.reshape(codes.to(tl.float32), (slot.shape[0], BLOCK_G, WIDTH))
    return tl.reshape(grouped * scale[:, :, None] + minimum[:, :, None], (slot.shape[0], BLOCK_D))


@triton.jit(do_not_specialize=["table_width"])
def _paged_attention_kernel(
    queries,
    keys,
    values,
    key_scales,
    value_scales,
    output,
    partials,
    statistics,
    counters,
    query_starts,
    starts,
    table_rows,
    block_tables,
    items,
    num_items,
    table_width,
    scale,
    soft_cap,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SEGMENT: tl.constexpr,
    KEY_TILE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LOOPS: tl.constexpr,
    COMBINE_STAGES: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // triton.next_power_of_2(GROUP)
    BLOCK_SHIFT: tl.constexpr = BLOCK_SIZE.bit_length() - 1
    # A product takes at least 16 of what it adds up.
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM) if HEAD_DIM > 16 else 16
    NUM_LOOPS: tl.constexpr = LOOPS if WINDOW is None else 1
    IS_INT4: tl.constexpr = keys.dtype.element_ty == tl.uint8
    head = tl.program_id(1)
    # A score becomes an exponent of 2; under a soft cap it has been scaled before.
    exponent_scale = _LOG2_E if soft_cap is not None else scale * _LOG2_E
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    tile_keys = tl.arange(0, KEY_TILE)
    for item in range(tl.program_id(0), tl.load(num_items), tl.num_programs(0)):
        sequence = tl.load(items + item * _ITEM_WORDS)
        query_tile = tl.load(items + item * _ITEM_WORDS + 1)
        first_segment = tl.load(items + item * _ITEM_WORDS + 2)
        last_segment = tl.load(items + item * _ITEM_WORDS + 3)
        partial = tl.load(items + item * _ITEM_WORDS + 4)
        query_start = tl.load(query_starts + sequence)
        num_queries = tl.load(query_starts + sequence + 1) - query_start
        start = tl.load(starts + sequence)
        table = block_tables + tl.load(table_rows + sequence) * table_width

        query = query_tile * BLOCK_Q + rows % BLOCK_Q
        is_row = (rows // BLOCK_Q < GROUP) & (query < num_queries)
        positions = start + query
        head_rows = (query_start + query) * (KV_HEADS * GROUP) + head * GROUP + rows // BLOCK_Q
        row_mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
        row_offsets = head_rows[:, None] * HEAD_DIM + dims[None, :]
        q = tl.load(queries + row_offsets, mask=row_mask, other=0.0)
        if INTERPRETED:
            q = q.to(tl.float32)
        # Keys first … end - 1 are those that some query of the tile sees.
        end = start + tl.minimum(num_queries, (query_tile + 1) * BLOCK_Q)
        first = 0
        if WINDOW is not None:
            first = tl.maximum(start + query_tile * BLOCK_Q - WINDOW + 1, 0)
        first_tile = tl.maximum(first_segment * SEGMENT, first) // KEY_TILE
        last_tile = tl.cdiv(tl.minimum(last_segment * SEGMENT, end), KEY_TILE)

        total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        total_sum = tl.zeros((BLOCK_M,), tl.float32)
        total_maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        part = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        part_sum = tl.zeros((BLOCK_M,), tl.float32)
        part_maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        for phase in tl.static_range(NUM_LOOPS):
            # Every query of the item sees every key of the first loop's tiles: they need no mask.
            unmasked_tile = (start + query_tile * BLOCK_Q + 1) // KEY_TILE
            is_masked = phase == NUM_LOOPS - 1
            from_tile = tl.maximum(first_tile, unmasked_tile) if NUM_LOOPS == 2 and is_masked else first_tile
            to_tile = last_tile if is_masked else tl.minimum(last_tile, unmasked_tile)
            for tile in range(from_tile, to_tile):
                if tile % (SEGMENT // KEY_TILE) == 0:
                    total, total_sum, total_maximum = _merge(
                        total, total_sum, total_maximum, part, part_sum, part_maximum
                    )
                    part = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
                    part_sum = tl.zeros((BLOCK_M,), tl.float32)
                    part_maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
                key = tile * KEY_TILE + tile_keys
                # Keys of others, and those that were never written, are not read: one of this tile's is instead.
                stored = tl.minimum(tl.maximum(key, first), end - 1)
                block = tl.load(table + (stored >> BLOCK_SHIFT)).to(tl.int64)
                slot = block * (BLOCK_SIZE * KV_HEADS) + ((stored & (BLOCK_SIZE - 1)) * KV_HEADS + head)
                offsets = slot[:, None] * HEAD_DIM + dims[None, :]
                if IS_INT4:
                    k = _load_int4(keys, key_scales, slot, HEAD_DIM, BLOCK_D)
                    v = _load_int4(values, value_scales, slot, HEAD_DIM, BLOCK_D)
                elif BLOCK_D == HEAD_DIM:
                    k = tl.load(keys + offsets)
                    v = tl.load(values + offsets)
                else:
                    k = tl.load(keys + offsets, mask=(dims < HEAD_DIM)[None, :], other=0.0)
                    v = tl.load(values + offsets, mask=(dims < HEAD_DIM)[None, :], other=0.0)
                scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
                if key_scales is not None and not IS_INT4:
                    scores *= tl.load(key_scales + slot)[None, :]
                if soft_cap is not None:
                    # cap * tanh(score / cap), by an exponential that may overflow harmlessly.
                    scores = soft_cap - 2 * soft_cap / (
                        1 + tl.exp2(scores * (scale / soft_cap * (2 * _LOG2_E)))
                    )
                if is_masked:
                    is_seen = key[None, :] <= positions[:, None]
                    if WINDOW is not None:
                        is_seen &= key[None, :] > positions[:, None] - WINDOW
                    scores = tl.where(is_seen, scores, -float("inf"))
                # Exponents are those of 2; one multiply-add scales a score and subtracts the maximum.
                maximum = tl.maximum(part_maximum, tl.max(scores, 1) * exponent_scale)
                finite = tl.where(maximum == -float("inf"), 0.0, maximum)
                factor = tl.exp2(part_maximum - finite)
                weights = tl.exp2(tl.fma(scores, exponent_scale, -finite[:, None]))
                part_sum = part_sum * factor + tl.sum(weights, 1)
                part_maximum = maximum
                if value_scales is not None and not IS_INT4:
                    weights *= tl.load(value_scales + slot)[None, :]
                part = tl.dot(
                    weights.to(q.dtype), v.to(q.dtype), part * factor[:, None], input_precision="ieee"
                )

        is_last = True
        if partial >= 0:
            first_part = first // SEGMENT
            num_parts = tl.cdiv(end, SEGMENT) - first_part
            num_rows = num_queries * GROUP
            compact = rows // BLOCK_Q * num_queries + rows % BLOCK_Q
            own = (partial + (first_segment - first_part) * num_rows + compact) * KV_HEADS + head
            tl.store(partials + own[:, None] * HEAD_DIM + dims[None, :], part, mask=row_mask)
            tl.store(statistics + own * 2, part_sum, mask=is_row)
            tl.store(statistics + own * 2 + 1, part_maximum, mask=is_row)
            # Whoever sees the counter sees what every thread has stored before.
            tl.debug_barrier()
            counter = counters + partial * KV_HEADS + head
            is_last = tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1
            if is_last:
                tl.store(counter, 0)
                for i in tl.range(0, num_parts, num_stages=COMBINE_STAGES):
                    stored_rows = (partial + i * num_rows + compact) * KV_HEADS + head
                    total, total_sum, total_maximum = _merge(
                        total,
                        total_sum,
                        total_maximum,
                        tl.load(
                            partials + stored_rows[:, None] * HEAD_DIM + dims[None, :],
                            mask=row_mask,
                            other=0.0,
                            cache_modifier=".cg",
                        ),
                        tl.load(statistics + stored_rows * 2, mask=is_row, other=0.0, cache_modifier=".cg"),
                        tl.load(
                            statistics + stored_rows * 2 + 1, mask=is_row, other=0.0, cache_modifier=".cg"
                        ),
                    )
        else:
            total, total_sum, total_maximum = _merge(
                total, total_sum, total_maximum, part, part_sum, part_maximum
            )
        if is_last:
            # Rows without a query have weights of 0 in sum.
            result = total / tl.where(is_row, total_sum, 1.0)[:, None]
            tl.store(output + row_offsets, result.to(output.dtype.element_ty), mask=row_mask)


FormName = Literal["decode", "prefill", "batch_invariant", "float32"]


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """One compiled kernel, and how its work is cut.

    A row's result is the same to the bit whatever is beside it, as long as one form computes it.

    Attributes:
        block_q: Query tokens of an item.
        num_programs: Programs of the grid for each key head, which share the items among them.
        key_tile: Keys of one step of the softmax. Part of the operation: it changes bits.
    """

    tile: Tile
    block_q: int
    num_programs: int
    key_tile: int


@functools.cache
def form(
    target: Target,
    name: FormName,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> AttentionForm:
    """The form that serves a model's layers.

    Args:
        name: "decode" for sequences with up to `block_q` queries, "prefill" for more, "batch_invariant" for either
            with the same bits. Queries in float32 have one form, whatever the name.
        dtype: The queries'.

    Raises:
        ValueError: More query heads share a key head than an item has rows.
    """
    block_d = max(triton.next_power_of_2(head_dim), 16)
    if dtype == torch.float32:
        operation = f"paged_attention.float32.{max(block_d, 64)}"
    else:
        operation = f"paged_attention.{name}.{max(block_d, 64)}.kv{8 * cache_dtype.itemsize}"
    # One entry serves any number of tokens: another one may add the weights of a row in another order.
    tile = select_tile(target, operation, 1)
    group = triton.next_power_of_2(num_heads // num_kv_heads)
    if group > tile["BLOCK_M"]:
        raise ValueError(
            f"{num_heads} heads share {num_kv_heads} key heads: more than {tile['BLOCK_M']} each"
        )
    # Converting keys of 4 or 8 bits and masking padded heads take registers, of which the wider forms have none to
    # spare.
    most_keys = 64
    if dtype == torch.float32:
        most_keys = 16 if cache_dtype.itemsize == 1 else 64
    elif name != "decode" and (cache_dtype.itemsize == 1 or head_dim != block_d):
        most_keys = 32
    sizes = {key: size for key, size in tile.sizes.items() if key != "PROGRAMS"}
    return AttentionForm(
        tile=replace(tile, sizes=sizes),
        block_q=tile["BLOCK_M"] // group,
        num_programs=max(1, target.num_processors * tile["PROGRAMS"] // num_kv_heads),
        key_tile=max(16, min(most_keys, 16384 // (block_d * dtype.itemsize))),
    )


@dataclass(frozen=True, slots=True)
class WorkList:
    """What the programs of a launch do.

    Attributes:
        items: [n, 5] int32, as `plan_items` makes them; rows from `num_items` on are not read.
        num_items: [1] int32.
    """

    items: torch.Tensor
    num_items: torch.Tensor


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where the items of split sequences leave their states; the lists of a step share it.

    Attributes:
        partials: [capacity, kv_heads, head_dim] float32.
        statistics: [capacity, kv_heads, 2] float32: sum and maximum of the weights.
        counters: [capacity, kv_heads] int32: zeros before and after a launch.
    """

    partials: torch.Tensor
    statistics: torch.Tensor
    counters: torch.Tensor


def make_scratch(capacity: int, num_kv_heads: int, head_dim: int, device: torch.device) -> Scratch:
    """Scratch of 4 * capacity * num_kv_heads * (head_dim + 3) bytes."""
    return Scratch(
        torch.empty(capacity, num_kv_heads, head_dim, dtype=torch.float32, device=device),
        torch.empty(capacity, num_kv_heads, 2, dtype=torch.float32, device=device),
        torch.zeros(capacity, num_kv_heads, dtype=torch.int32, device=device),
    )


def scratch_capacity(num_slots: int, max_num_seqs: int, max_model_len: int, group: int) -> int:
    """A capacity in which all sequences that the cache holds can be split when they decode, or a long one's chunk.

    Args:
        num_slots: Of the cache.
        group: Query heads that share a key head.
    """
    decodes = group * (num_slots // SEGMENT + max_num_seqs)
    return max(decodes, _MAX_ROWS * -(-max_model_len // SEGMENT))


_MAX_ROWS = 128
"""The largest BLOCK_M."""


@dataclass(frozen=True, slots=True)
class TritonPlan(AttentionPlan):
    """Which queries and keys attention reads, in tensors on the device.

    Attributes:
        decode, prefill: The lists of both forms; None where there is nothing to launch.
    """

    decode: WorkList | None
    prefill: WorkList | None
    scratch: Scratch


Integers = np.ndarray[tuple[int], np.dtype[np.integer]]


def plan_items(
    query_lens: Integers,
    starts: Integers,
    window: int | None,
    group: int,
    block_q: int,
    num_programs: int,
    capacity: int,
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """The items of one launch, ordered so that the programs, which take every num_programs-th, end together.

    Sequences whose queries fit one tile are split into segments when the programs would end apart otherwise,
    those with most keys first, as long as the scratch has room.

    Args:
        query_lens: [S], queries of each sequence; 0 for those that this launch leaves out.
        starts: [S], position of each sequence's first query.
        group: Query heads that share a key head.
        block_q, num_programs: The form's.
        capacity: The scratch's.

    Returns:
        [n, 5]: sequence, query tile, first segment, last segment (exclusive), and the first row of the
        sequence in the scratch, or -1 where it is not split.
    """
    tiles = -(-query_lens // block_q)
    sequence = np.repeat(np.arange(len(query_lens)), tiles)
    tile = np.arange(len(sequence)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    lens, first_query = query_lens[sequence], starts[sequence] + tile * block_q
    end = np.minimum(starts[sequence] + lens, first_query + block_q)
    first = np.zeros_like(end) if window is None else np.maximum(first_query - window + 1, 0)
    first_segment, last_segment = first // SEGMENT, -(-end // SEGMENT)
    num_segments = last_segment - first_segment
    num_keys = end - first
    partial = np.full(len(sequence), -1)
    order = _balance(num_keys, num_programs)
    loads = np.bincount(np.arange(len(order)) % num_programs, num_keys[order], minlength=num_programs)
    if loads.max() > _MAX_IMBALANCE * loads.mean() + SEGMENT:
        num_rows = num_segments * lens * group
        candidates = np.flatnonzero((num_segments > 1) & (lens <= block_q) & (num_rows <= capacity))
        candidates = candidates[np.argsort(-num_segments[candidates], kind="stable")]
        next_row = np.cumsum(num_rows[candidates])
        candidates, next_row = candidates[next_row <= capacity], next_row[next_row <= capacity]
        partial[candidates] = next_row - num_rows[candidates]
        # A split sequence becomes as many items as it has segments.
        copies = np.where(partial >= 0, num_segments, 1)
        parts = np.arange(copies.sum()) - np.repeat(np.cumsum(copies) - copies, copies)
        source = np.repeat(np.arange(len(sequence)), copies)
        sequence, tile, partial, num_keys = sequence[source], tile[source], partial[source], num_keys[source]
        first_segment, last_segment = first_segment[source] + parts, last_segment[source]
        last_segment = np.where(partial >= 0, first_segment + 1, last_segment)
        num_keys = np.where(partial >= 0, SEGMENT, num_keys)
        order = _balance(num_keys, num_programs)
    items = np.stack((sequence, tile, first_segment, last_segment, partial), axis=1)
    return items[order].astype(np.int32)


_MAX_IMBALANCE = 1.125
"""How much longer than the mean a program may take before sequences are split."""


def _balance(costs: Integers, num_programs: int) -> Integers:
    """An order of items in which every num_programs-th have costs of about the same sum.

    Falling costs are dealt to the programs in turns of alternating direction, the last full turn rising.
    """
    order = np.argsort(-costs, kind="stable")
    num_turns = len(order) // num_programs
    turns = order[: num_turns * num_programs].reshape(num_turns, num_programs)
    turns[num_turns - 1 :: -2] = turns[num_turns - 1 :: -2, ::-1].copy()
    return order


def triton_attention(
    queries: torch.Tensor,
    layer: KVLayer,
    plan: TritonPlan,
    scale: float,
    window: int | None,
    soft_cap: float,
    batch_invariant: bool,
) -> torch.Tensor:
    """`paged_attention` of queries [T, heads, head_dim], contiguous; in float32, bf16 or fp16.

    Raises:
        ValueError: More query heads share a key head than an item has rows.
    """
    target = target_of(queries)
    assert target is not None
    _, num_heads, head_dim = queries.shape
    num_kv_heads = layer.data.shape[3]
    output = torch.empty_like(queries)
    names: tuple[FormName, FormName] = ("decode", "prefill")
    for name, work in zip(names, (plan.decode, plan.prefill), strict=True):
        if work is None:
            continue
        chosen = form(
            target,
            "batch_invariant" if batch_invariant else name,
            queries.dtype,
            layer.data.dtype,
            num_heads,
            num_kv_heads,
            head_dim,
        )
        launch(
            _paged_attention_kernel,
            (chosen.num_programs, num_kv_heads),
            {
                "queries": queries,
                "keys": layer.keys,
                "values": layer.values,
                "key_scales": layer.key_scales,
                "value_scales": layer.value_scales,
                "output": output,
                "partials": plan.scratch.partials,
                "statistics": plan.scratch.statistics,
                "counters": plan.scratch.counters,
                "query_starts": plan.query_starts,
                "starts": plan.starts,
                "table_rows": plan.table_rows,
                "block_tables": plan.block_tables,
                "items": work.items,
                "num_items": work.num_items,
                "table_width": plan.block_tables.stride(0),
                "scale": scale,
                "soft_cap": soft_cap or None,
            },
            chosen.tile,
            WINDOW=window,
            GROUP=num_heads // num_kv_heads,
            KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=layer.block_size,
            SEGMENT=SEGMENT,
            KEY_TILE=chosen.key_tile,
            INTERPRETED=target.arch == "interpreter",
        )
    return output.flatten(1)
