"""Paged attention against attention written out, over scattered blocks and every kind of chunk."""

from __future__ import annotations

import pytest
import torch

from engine.core.batch import BatchRow
from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.attention.in_torch import paged_attention, plan_attention, reference, slot_mapping
from engine.kernels.attention.kv_layer import INT4, KVCache, KVLayer
from engine.kernels.norm import reference as norm_reference
from engine.kernels.norm import rms_norm
from engine.kernels.rotary import apply_rotary


@pytest.mark.parametrize("window", [None, 1, 5, 32])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 80), (2, 2, 96), (4, 2, 256), (2, 1, 24)]
)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_equals_the_reference(
    window: int | None, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    # (tokens before the chunk, tokens of the chunk): decodes, chunks, a fresh prompt, one token alone.
    lengths = [(37, 1), (0, 20), (11, 7), (0, 1), (15, 1), (16, 16), (600, 1)]
    num_blocks = sum(-(-(start + size) // block_size) for start, size in lengths)
    order = (torch.randperm(num_blocks, generator=generator) + 1).tolist()
    layer = KVLayer(torch.full((2, num_blocks + 1, block_size, num_kv_heads, head_dim), torch.nan))
    rows, queries, stored = [], [], []
    for start, size in lengths:
        end = start + size
        table = [order.pop() for _ in range(-(-end // block_size))]
        keys, values = torch.randn(2, end, num_kv_heads, head_dim, generator=generator)
        whole = BatchRow(list(range(end)), 0, 0, table, None)
        layer.write(slot_mapping([whole], block_size), keys, values)
        rows.append(BatchRow(list(range(size)), start, 0, table, None))
        queries.append(torch.randn(size, num_heads, head_dim, generator=generator))
        stored.append((keys, values))
    plans = plan_attention(rows, layer, window, torch.float32)
    output = paged_attention(torch.cat(queries), layer, plans, scale=0.3)
    expected = [
        reference(query, keys, values, start, window, 0.3)
        for query, (keys, values), (start, _) in zip(queries, stored, lengths, strict=True)
    ]
    torch.testing.assert_close(output, torch.cat(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int8, INT4])
@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_codes_are_attended_to_as_the_floats_that_they_stand_for(head_dim: int, dtype: torch.dtype) -> None:
    codes = KVCache.allocate(1, 9, 4, 3, head_dim, dtype, torch.device("cpu")).layer(0)
    floats = KVLayer(torch.empty(2, 9, 4, 3, head_dim))
    slots = torch.arange(36)
    codes.write(slots, *torch.randn(2, 36, 3, head_dim))
    floats.write(slots, *codes.read(slots))
    rows = [BatchRow([0], 9, 0, [1, 2, 3], None), BatchRow([0] * 6, 4, 0, [5, 8, 6], None)]
    queries = torch.randn(7, 9, head_dim)
    expected, actual = (
        paged_attention(queries, layer, plan_attention(rows, layer, 7, torch.float32), 0.1)
        for layer in (floats, codes)
    )
    assert torch.equal(actual, expected)


def test_a_row_does_not_depend_on_the_batch() -> None:
    layer = KVLayer(torch.randn(2, 9, 4, 3, 64))
    rows = [BatchRow([0], 9, 0, [1, 2, 3], None), BatchRow([0] * 6, 4, 0, [5, 8, 6], None)]
    queries = torch.randn(7, 9, 64)
    together = paged_attention(queries, layer, plan_attention(rows, layer, None, torch.float32), 0.1)
    for row, part in zip(rows, torch.split(queries, [1, 6]), strict=True):
        alone = paged_attention(part, layer, plan_attention([row], layer, None, torch.float32), 0.1)
        start = 0 if len(row.token_ids) == 1 else 1
        assert torch.equal(alone, together[start : start + len(row.token_ids)])


def test_stored_tokens_are_written_to_the_null_block() -> None:
    row = BatchRow([5, 6, 7], start=6, num_stored_tokens=8, block_table=[4, 9, 2], draw=None)
    assert slot_mapping([row], 4).tolist() == [2, 3, 2 * 4 + 0]


def test_rms_norm_equals_its_formula() -> None:
    x, weight = torch.randn(5, 96), torch.randn(96)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), norm_reference(x, weight, 1e-5))


def test_gates() -> None:
    gate_up = torch.randn(3, 10)
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    torch.testing.assert_close(silu_mul(gate_up), gate * torch.sigmoid(gate) * up)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(gelu_mul(gate_up), 0.5 * gate * (1 + torch.tanh(inner)) * up)


def test_rotary_rotates_pairs() -> None:
    heads = torch.randn(4, 2, 6)
    angles = torch.rand(4, 1, 3)
    cosine, sine = angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)
    rotated = apply_rotary(heads, cosine, sine)
    as_complex = torch.complex(heads[..., :3], heads[..., 3:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotated, torch.cat((as_complex.real, as_complex.imag), dim=-1))
