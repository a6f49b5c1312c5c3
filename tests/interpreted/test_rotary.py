"""Rotary embedding with the cache write against plain torch, for every kind of cache."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.attention.kv_layer import INT4, KVCache, KVLayer
from engine.kernels.rotary import reference, rotate_and_write

CACHE_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, INT4]


def make_layer(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> KVLayer:
    cache = KVCache.allocate(1, num_blocks, block_size, num_kv_heads, head_dim, dtype, torch.device("cpu"))
    cache.data.zero_()
    if cache.scales is not None:
        cache.scales.zero_()
    return cache.layer(0)


def make_inputs(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads, positions, cosine, sine, slots: the last token is padding and goes to slot 0."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    positions = torch.randint(0, 50, (num_tokens,), generator=generator, dtype=torch.int32)
    angles = torch.rand(50, head_dim // 2, generator=generator) * 6
    slots = torch.randperm(40, generator=generator)[:num_tokens].to(torch.int32) + 4
    slots[num_tokens - 1 :] = 0
    return heads, positions, angles.cos(), angles.sin(), slots


STEPS = {torch.float32: 2**-21, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""One step of each dtype, relative; of float32, in which all else is computed, a few."""


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Equal up to a step of the coarsest dtype that is rounded to on the way, taken at the vector's largest.

    An element is a difference of two products, whose errors are steps of these.
    """
    step = max(STEPS[dtype] for dtype in dtypes)
    error, largest = (actual.float() - expected.float()).abs(), expected.float().abs().amax(-1, keepdim=True)
    assert (error <= 2 * step * largest).all()


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "dtype"),
    [
        (1, 4, 1, 64, torch.float16),
        (3, 9, 3, 80, torch.float32),
        (17, 2, 2, 24, torch.bfloat16),
        (3, 8, 1, 256, torch.float16),
    ],
)
def test_equals_the_reference(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    has_norm: bool,
) -> None:
    heads, positions, cosine, sine, slots = make_inputs(num_tokens, num_heads, num_kv_heads, head_dim, dtype)
    heads[0, num_heads] = 0  # a key of zeros
    norms = torch.rand(2, head_dim).to(dtype) + 0.5 if has_norm else (None, None)
    layers = [make_layer(11, 4, num_kv_heads, head_dim, cache_dtype) for _ in range(2)]
    actual, expected = (
        function(heads, positions, cosine, sine, layer, slots, num_kv_heads, *norms, 1e-6)
        for function, layer in zip((rotate_and_write, reference), layers, strict=True)
    )
    assert actual.is_contiguous()
    assert_close(actual, expected, dtype)
    if cache_dtype == INT4:
        assert_int4_close(*layers, slots, STEPS[dtype] if has_norm else STEPS[torch.float32])
        return
    if cache_dtype != torch.int8:
        assert_close(layers[0].data, layers[1].data, dtype, cache_dtype)
        return
    # A code may be the neighbour where the value before it differs by a rounding.
    codes = layers[0].data.int() - layers[1].data.int()
    assert codes.abs().max() <= 1
    assert (codes != 0).float().mean() < 0.05
    # The largest element differs as the others do: by steps of the norm's output, before two products of it.
    step = 2 * STEPS[dtype] if has_norm else STEPS[torch.float32]
    torch.testing.assert_close(layers[0].scales, layers[1].scales, rtol=step, atol=0)


def assert_int4_close(actual: KVLayer, expected: KVLayer, slots: torch.Tensor, step: float) -> None:
    """Equal up to a code, where the value before it differs by a rounding, and to what moves a scale or a minimum."""
    assert actual.scales is not None
    assert expected.scales is not None
    halves = zip(
        actual.read(slots.long()), expected.read(slots.long()), expected.scales.flatten(1, 2), strict=True
    )
    for a, b, stored in halves:
        coarsest = stored[slots.long()][..., 0].float().amax(-1)[..., None]
        moved = (2 * step + 2**-10) * b.abs().amax(-1, keepdim=True)
        assert ((a - b).abs() <= coarsest + 2 * moved).all()
        # Most codes are the same ones: half a step apart is a code.
        assert ((a - b).abs() > coarsest / 2 + moved).float().mean() < 0.05


@pytest.mark.parametrize("head_dim", [16, 64, 80])
def test_int4_values_are_quantized_exactly(head_dim: int) -> None:
    """Values are not rotated: bytes, scales and minimums equal the reference's, in groups of all sizes."""
    heads, positions, _, _, slots = make_inputs(17, 1, 2, head_dim, torch.float32)
    heads[3, -1] = 7.77  # all elements alike
    heads[4, -2, : head_dim // 2] = 0
    heads[5, -1] *= 1e-4
    angles = torch.zeros(50, head_dim // 2)
    layers = [make_layer(11, 4, 2, head_dim, INT4) for _ in range(2)]
    for function, layer in zip((rotate_and_write, reference), layers, strict=True):
        function(heads, positions, angles.cos(), angles.sin(), layer, slots, 2)
    assert torch.equal(layers[0].data, layers[1].data)
    assert torch.equal(layers[0].scales, layers[1].scales)
    restored = layers[0].read(slots[:-1].long())[1]
    assert (restored - heads[:-1, -2:]).abs().max() < heads.abs().max() / 10


def test_int8_values_are_quantized_exactly() -> None:
    """Values are not rotated: codes and scales equal the reference's, ties to even included."""
    heads, positions, cosine, sine, slots = make_inputs(5, 1, 2, 16, torch.float32)
    heads[:, -2:] = torch.arange(5 * 2 * 16).view(5, 2, 16) % 255 - 127 + 0.5
    heads[:, -1, 0] = 127
    layers = [make_layer(11, 4, 2, 16, torch.int8) for _ in range(2)]
    for function, layer in zip((rotate_and_write, reference), layers, strict=True):
        function(heads, positions, cosine, sine, layer, slots, 2)
    assert torch.equal(layers[0].values, layers[1].values)
    assert torch.equal(layers[0].scales[1], layers[1].scales[1])
    assert (heads[:4, -1] == heads[:4, -1].floor() + 0.5).any()


@pytest.mark.parametrize("head_dim", [6, 24, 64, 80])
def test_int8_heads_are_spread_exactly(head_dim: int) -> None:
    """Sums and differences in one order: queries, codes and scales equal the reference's."""
    heads, positions, _, _, slots = make_inputs(7, 3, 2, head_dim, torch.float32)
    unturned = torch.ones(50, head_dim // 2), torch.zeros(50, head_dim // 2)
    layers = [make_layer(12, 4, 2, head_dim, torch.int8) for _ in range(2)]
    queries = [
        function(heads, positions, *unturned, layer, slots, 2)
        for function, layer in zip((rotate_and_write, reference), layers, strict=True)
    ]
    assert torch.equal(*queries)
    assert not torch.equal(queries[0], heads[:, :3])
    assert torch.equal(layers[0].data, layers[1].data)
    assert torch.equal(layers[0].scales, layers[1].scales)


def test_fp8_saturates() -> None:
    """On numbers that fp8 has: Triton's interpreter (3.9) misrounds others whose carry reaches the exponent."""
    heads, positions, _, _, slots = make_inputs(5, 2, 2, 16, torch.float32)
    heads = heads.to(torch.float8_e4m3fn).float()
    heads[1, 2:, 3:5] = torch.tensor([1000.0, -449.0])
    layer = make_layer(11, 4, 2, 16, torch.float8_e4m3fn)
    rotate_and_write(heads, positions, torch.ones(50, 8), torch.zeros(50, 8), layer, slots, 2)
    stored = layer.data.flatten(1, 2)[:, slots.long()].float()
    assert torch.equal(stored[0], heads[:, 2:4].clamp(-448, 448))
    assert torch.equal(stored[1], heads[:, 4:].clamp(-448, 448))


def test_other_slots_are_left_alone() -> None:
    heads, positions, cosine, sine, slots = make_inputs(3, 2, 1, 16, torch.float32)
    layer = make_layer(11, 4, 1, 16, torch.float32)
    layer.data.fill_(7)
    rotate_and_write(heads, positions, cosine, sine, layer, slots, 1)
    others = torch.ones(44, dtype=torch.bool)
    others[slots.long()] = False
    assert (layer.data.flatten(1, 2)[:, others] == 7).all()
    assert torch.equal(layer.values.flatten(0, 1)[slots.long()], heads[:, -1:])
