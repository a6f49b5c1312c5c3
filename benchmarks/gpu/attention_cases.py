"""Timed attention beside torch's, over Llama-3.1-8B's heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.attention import LLAMA
from benchmarks.gpu.cases import Case
from benchmarks.gpu.paged import Heads, Sequences, make_layer, make_plan, make_tables
from benchmarks.gpu.timing import Call, num_copies
from engine.kernels.attention.dispatch import paged_attention

BF16 = torch.bfloat16


def _batch(
    lengths: Sequence[tuple[int, int]], heads: Heads, device: torch.device
) -> tuple[list[Sequences], int]:
    """Copies of a batch over caches of their own, and the bytes of one's keys and values."""
    num_keys = sum(start + count for start, count in lengths)
    num_bytes = 2 * num_keys * heads.num_kv_heads * heads.head_dim * heads.cache_dtype.itemsize
    num_tokens = sum(count for _, count in lengths)
    batches = []
    for _ in range(num_copies(num_bytes, device)):
        tables, num_blocks = make_tables(lengths, device)
        queries = torch.randn(num_tokens, heads.num_heads, heads.head_dim, device=device).to(heads.dtype)
        layer = make_layer(num_blocks, heads, device, is_filled=True)
        batches.append(Sequences(lengths, heads, queries, layer, tables))
    return batches, num_bytes


def _paged(batches: Sequence[Sequences], batch_invariant: bool) -> Callable[[], Sequence[Call]]:
    def make() -> Sequence[Call]:
        return [
            partial(
                paged_attention,
                batch.queries,
                batch.layer,
                make_plan(batch, None, batch_invariant),
                batch.heads.scale,
                batch_invariant=batch_invariant,
            )
            for batch in batches
        ]

    return make


def _dense(
    num_seqs: int, context: int, num_queries: int, heads: Heads, copies: int, device: torch.device
) -> Any:
    """Queries, keys and values as SDPA takes them, [sequences, heads, tokens, head_dim] each."""
    shape = (num_seqs, heads.num_kv_heads, context, heads.head_dim)
    return [
        (
            torch.randn(num_seqs, heads.num_heads, num_queries, heads.head_dim, dtype=BF16, device=device),
            torch.randn(shape, dtype=BF16, device=device),
            torch.randn(shape, dtype=BF16, device=device),
        )
        for _ in range(copies)
    ]


def _sdpa(backend: SDPBackend, is_causal: bool, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    queries, keys, values = tensors
    is_grouped = queries.shape[1] != keys.shape[1]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            queries, keys, values, is_causal=is_causal, enable_gqa=is_grouped
        )


def _sdpa_calls(
    num_seqs: int, context: int, num_queries: int, copies: int, device: torch.device
) -> dict[str, Callable[[], Sequence[Call]]]:
    """SDPA's backends over contiguous keys and values."""
    is_causal = num_queries > 1

    def make(backend: SDPBackend, expands: bool) -> Sequence[Call]:
        batches = _dense(num_seqs, context, num_queries, LLAMA, copies, device)
        if expands:  # has no grouped queries
            repeats = LLAMA.num_heads // LLAMA.num_kv_heads
            batches = [(q, *(x.repeat_interleave(repeats, dim=1) for x in kv)) for q, *kv in batches]
        return [partial(_sdpa, backend, is_causal, tensors) for tensors in batches]

    calls = {
        "SDPA flash": partial(make, SDPBackend.FLASH_ATTENTION, False),
        "SDPA cuDNN": partial(make, SDPBackend.CUDNN_ATTENTION, False),
    }
    if is_causal:
        calls["SDPA efficient"] = partial(make, SDPBackend.EFFICIENT_ATTENTION, True)
    return dict(calls)


def decode_cases(
    counts: Sequence[int],
    context: int,
    cache_dtype: torch.dtype,
    device: torch.device,
    has_others: bool = True,
) -> list[Case]:
    """One query a sequence over `context` keys."""
    heads = Heads(LLAMA.num_heads, LLAMA.num_kv_heads, LLAMA.head_dim, BF16, cache_dtype)
    cases = []
    for count in counts:
        batches, num_bytes = _batch([(context - 1, 1)] * count, heads, device)
        if cache_dtype == torch.int8:
            num_bytes += 2 * count * context * heads.num_kv_heads * 4
        calls = {"ours": _paged(batches, False), "batch_invariant": _paged(batches, True)}
        if has_others:
            calls |= _sdpa_calls(count, context, 1, len(batches), device)
        operations = 4 * count * context * heads.num_heads * heads.head_dim
        size = num_bytes + 4 * count * heads.num_heads * heads.head_dim
        cases.append(Case(count, size, operations, calls))
    return cases


def prefill_cases(counts: Sequence[int], context: int, device: torch.device) -> list[Case]:
    """Whole prompts of `context` tokens."""
    cases = []
    for count in counts:
        batches, num_bytes = _batch([(0, context)] * count, LLAMA, device)
        calls = {
            "ours": _paged(batches, False),
            "batch_invariant": _paged(batches, True),
            **_sdpa_calls(count, context, context, len(batches), device),
        }
        operations = 2 * count * context * (context + 1) * LLAMA.num_heads * LLAMA.head_dim
        size = num_bytes + 4 * count * context * LLAMA.num_heads * LLAMA.head_dim
        cases.append(Case(count, size, operations, calls))
    return cases


def _flex(compiled: Callable[..., Any], mask: Any, tensors: Sequence[torch.Tensor]) -> Any:
    return compiled(*tensors, block_mask=mask, enable_gqa=True)


def flex_cases(count: int, context: int, num_queries: int, device: torch.device) -> list[Case]:
    """FlexAttention, which compiles itself, beside ours."""
    is_causal = num_queries > 1
    lengths = [(context - num_queries, num_queries)] * count
    batches, num_bytes = _batch(lengths, LLAMA, device)

    def make() -> Sequence[Call]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return query >= key

        mask = create_block_mask(causal, None, None, context, context, device=device) if is_causal else None
        compiled = torch.compile(flex_attention, dynamic=False)
        dense = _dense(count, context, num_queries, LLAMA, len(batches), device)
        return [partial(_flex, compiled, mask, tensors) for tensors in dense]

    seen = context * (context + 1) // 2 if is_causal else context
    operations = 4 * count * seen * LLAMA.num_heads * LLAMA.head_dim
    return [Case(count, num_bytes, operations, {"ours": _paged(batches, False), "flex": make})]
