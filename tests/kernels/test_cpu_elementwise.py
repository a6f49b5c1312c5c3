"""The CPU's operations on tokens one by one: C against torch's operators, and each token alone."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels import cpu, rotary
from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.attention.in_c import gather
from engine.kernels.attention.kv_layer import CACHE_TYPES, INT4, INT4_GROUP, KVCache, KVLayer
from engine.kernels.norm import add, rms_norm
from engine.kernels.operands import SparseInt8Activations, SparseInt8Format
from engine.kernels.quantize import quantize_sparse, sparse_reference
from engine.kernels.sample import DrawParameters, draw_tokens
from engine.quant.cpu_formats import CPU_ACTIVATIONS

SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 576, 1000]
"""Columns: whole vectors, blocks and lines, and parts of them."""

FORMATS = [CPU_ACTIVATIONS, SparseInt8Format(1.0), SparseInt8Format(0.0), SparseInt8Format(math.inf)]


@pytest.fixture(autouse=True)
def compiler() -> None:
    if cpu.library() is None:
        pytest.skip("there is no C compiler on this machine")


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, NaNs to NaNs."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def tokens(size: int) -> torch.Tensor:
    """[20, size]: zeros, equal values, ties, outliers, the ends of float32, what is not finite, and random ones."""
    x = torch.randn(20, size) * 3
    x[0] = 0.0
    x[1] = 0.7
    x[2] = torch.arange(size) % 255 - 127.0
    x[3] = (torch.arange(size) % 255 - 127.0) / 2
    x[4, -1] = 1e6
    x[5, size // 2] = -1000.0
    x[6] = x[6].sign() * 3.4e38
    x[7] *= 1e-30
    x[8] *= 1e-43
    x[9, ::2] = 0.0
    x[10, 0] = torch.nan
    x[11, -1] = torch.inf
    x[12, size // 2] = -torch.inf
    x[13] = 0.0
    x[13, -1] = 2.0
    return x


def unpack(codes: SparseInt8Activations, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low terms [2, M, size] int64, and scales [M]; checks sums, order and padding."""
    num_quads = codes.tokens[:, 3].tolist()
    high = torch.zeros(codes.num_tokens, codes.low.shape[1], dtype=torch.int64)
    for token, size_of_quads in enumerate(num_quads):
        quads = codes.quads[token, :size_of_quads]
        places = quads[:, 0].tolist()
        assert places == sorted(set(places))
        values = quads[:, 1:].contiguous().view(torch.int8)
        assert values.any(dim=1).all()
        for place, value in zip(places, values, strict=True):
            high[token, 4 * place : 4 * place + 4] = value.long()
    low = codes.low.long()
    assert torch.equal(codes.tokens[:, 1].long(), low.sum(dim=1))
    assert torch.equal(codes.tokens[:, 2].long(), high.sum(dim=1))
    assert not low[:, size:].any()
    assert not high[:, size:].any()
    return torch.stack((high, low))[:, :, :size], codes.tokens[:, 0].clone().view(torch.float32)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"spread-{format.spread}")
@pytest.mark.parametrize("size", SIZES)
def test_codes_equal_the_reference_to_the_bit(size: int, format: SparseInt8Format) -> None:
    x = tokens(size)
    terms, scale = unpack(quantize_sparse(x, format), size)
    expected, expected_scale = sparse_reference(x, format)
    assert torch.equal(terms, expected.long())
    assert_same(scale, expected_scale[:, 0])
    assert terms.abs().max() <= 127
    assert scale[10:13].isnan().all()
    assert not terms[:, 10:13].any()
    # Of tokens that lie apart, and of one alone.
    wide = torch.full((20, size + 5), torch.nan)
    wide[:, :size] = x
    for source in (wide[:, :size], wide[3:4, :size]):
        apart = quantize_sparse(source, format)
        first = 0 if len(source) == 20 else 3
        terms_apart, scale_apart = unpack(apart, size)
        assert torch.equal(terms_apart, terms[:, first : first + len(source)])
        assert_same(scale_apart, scale[first : first + len(source)])


def assert_same_codes(actual: object, expected: SparseInt8Activations, size: int) -> None:
    assert isinstance(actual, SparseInt8Activations)
    (terms, scale), (expected_terms, expected_scale) = (unpack(x, size) for x in (actual, expected))
    assert torch.equal(terms, expected_terms)
    assert_same(scale, expected_scale)


def floats(x: object) -> torch.Tensor:
    assert isinstance(x, torch.Tensor)
    return x


@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size: int, has_delta: bool) -> None:
    x, weight = tokens(size), torch.randn(size)
    x[6] *= 1e-30  # squares that float32 holds
    delta = torch.randn(20, size) if has_delta else None
    summed = x if delta is None else x + delta
    kept = x.clone()
    y = floats(rms_norm(x, weight, 1e-5, delta=delta))
    assert_same(x, summed)
    exact = summed.double()
    exact = exact * torch.rsqrt(exact.square().mean(dim=1, keepdim=True) + 1e-5) * weight
    finite = [row for row in range(20) if row not in (10, 11, 12)]
    # Sixteen chains of fused squares, their sum, and six operations more.
    bound = (size / 16 + 12) * 2**-24 * exact[finite].abs() + 1e-44
    assert torch.all((y[finite] - exact[finite]).abs() <= bound)
    assert y[10].isnan().all()
    assert y[11:13].isnan().any(dim=1).all()
    for first, last in [(0, 1), (13, 14), (3, 9)]:
        part = kept[first:last].clone()
        delta_of_part = None if delta is None else delta[first:last].contiguous()
        assert_same(floats(rms_norm(part, weight, 1e-5, delta=delta_of_part)), y[first:last])
    codes = rms_norm(kept.clone(), weight, 1e-5, CPU_ACTIVATIONS, delta)
    assert_same_codes(codes, quantize_sparse(y, CPU_ACTIVATIONS), size)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", SIZES)
def test_gated(size: int, activation: str) -> None:
    gate, up = tokens(size), torch.randn(20, size) * 2
    gate[6] = torch.linspace(-90, 90, size)
    gate_up = torch.cat((gate, up), dim=1)
    apply = silu_mul if activation == "silu" else gelu_mul
    y = floats(apply(gate_up))
    exact = gate.double()
    inner = exact if activation == "silu" else 2 * math.sqrt(2 / math.pi) * (exact + 0.044715 * exact**3)
    exact = exact * torch.sigmoid(inner) * up.double()
    finite = gate.isfinite()
    # The sigmoid is off by a few 2**-24.
    bound = 1e-6 * (gate.double() * up).abs() + 1e-44
    assert torch.all(((y - exact).abs() <= bound)[finite])
    assert not y[~finite].isfinite().any()
    for first, last in [(0, 1), (13, 14), (3, 9)]:
        assert_same(floats(apply(gate_up[first:last])), y[first:last])
    codes = apply(gate_up, CPU_ACTIVATIONS)
    assert_same_codes(codes, quantize_sparse(y, CPU_ACTIVATIONS), size)


@pytest.mark.parametrize("size", SIZES)
def test_add_and_gather(size: int) -> None:
    x, delta = tokens(size), torch.randn(20, size)
    expected = x + delta
    assert add(x, delta) is x
    assert_same(x, expected)
    rows = torch.tensor([3, 3, 19, 0, 11], dtype=torch.int32)
    assert_same(gather(x, rows), x[rows.long()])
    assert gather(x, rows[:0]).shape == (0, size)


def likeliest(row: list[float]) -> int:
    """The first of the largest; -1 where there is none."""
    if any(math.isnan(value) for value in row) or math.isinf(max(row)):
        return -1
    return row.index(max(row))


@pytest.mark.parametrize("size", SIZES)
def test_argmax(size: int) -> None:
    ties = torch.randint(0, 3, (30, size)).float()
    banned = torch.randn(30, size).masked_fill(torch.rand(30, size) < 0.5, -torch.inf)
    last = torch.zeros(2, size)
    last[0, -1], last[1, 0] = 1.0, -1.0
    broken = torch.randn(6, size)
    for row, value in enumerate([torch.nan, torch.inf, -torch.inf] * 2):
        broken[row, 0 if row < 3 else -1] = value
    signed = torch.full((1, size), -0.0)
    signed[0, -1] = 0.0
    everything = torch.full((1, size), -torch.inf)
    largest = torch.full((1, size), 3.4e38)
    logits = torch.cat((torch.randn(30, size), ties, banned, last, broken, signed, everything, largest))
    words, zeros = torch.zeros(len(logits), dtype=torch.int32), torch.zeros(len(logits))
    drawn = draw_tokens(logits, DrawParameters(words, words, zeros, words, zeros, zeros), filters=False)
    assert drawn.tolist() == [likeliest(row) for row in logits.tolist()]


NUM_POSITIONS = 50


def rotary_table(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(NUM_POSITIONS, head_dim // 2) * 100
    return angles.cos(), angles.sin()


def empty_layer(dtype: torch.dtype, block_size: int, kv_heads: int, head_dim: int) -> KVLayer:
    return zeros(dtype, 64 // block_size, block_size, kv_heads, head_dim)


def zeros(dtype: torch.dtype, num_blocks: int, block_size: int, kv_heads: int, head_dim: int) -> KVLayer:
    cache = KVCache.allocate(1, num_blocks, block_size, kv_heads, head_dim, dtype, torch.device("cpu"))
    cache.data.zero_()
    if cache.scales is not None:
        cache.scales.zero_()
    return cache.layer(0)


def read_all(layer: KVLayer) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.read(torch.arange(64))


@pytest.mark.parametrize("dtype", CACHE_TYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("head_dim", [24, 64, 80, 96, 128, 256])
def test_rotary_and_cache_write(head_dim: int, group: int, dtype: torch.dtype) -> None:
    kv_heads, num_tokens = 2, 13
    num_heads = group * kv_heads
    heads = torch.randn(num_tokens, num_heads + 2 * kv_heads, head_dim) * 2
    heads[3] = 0.0
    heads[4] *= 1000
    heads[5] *= 1e-4
    positions = torch.randint(0, NUM_POSITIONS, (num_tokens,), dtype=torch.int32)
    slots = torch.randperm(64)[:num_tokens].int()
    cosine, sine = rotary_table(head_dim)
    for block_size, weights in ((4, None), (16, torch.randn(2, head_dim))):
        norm = (None, None, 0.0) if weights is None else (weights[0], weights[1], 1e-6)
        layers = [empty_layer(dtype, block_size, kv_heads, head_dim) for _ in range(3)]
        rotated = heads.clone()
        queries = rotary.rotate_and_write(rotated, positions, cosine, sine, layers[0], slots, kv_heads, *norm)
        expected = rotary.reference(heads, positions, cosine, sine, layers[1], slots, kv_heads, *norm)
        # Two products of what is at most as large as the head's largest, and their sum; before, the norm.
        size = expected.abs().amax(dim=2, keepdim=True) + 1e-30
        assert torch.all((queries - expected).abs() <= (head_dim / 16 + 24) * 2**-24 * 2 * size)
        # Rotated keys are left in place: stored, they are what torch stores of them, to the bit.
        keys, values = rotated[:, num_heads : num_heads + kv_heads], rotated[:, num_heads + kv_heads :]
        assert torch.equal(values, heads[:, num_heads + kv_heads :])
        layers[2].write(slots.long(), keys, values)
        for stored, wanted in zip(read_all(layers[0]), read_all(layers[2]), strict=True):
            assert torch.equal(stored, wanted)
        assert torch.equal(read_all(layers[0])[1], read_all(layers[1])[1])
        # And within a step of those that the reference rotated.
        stored, wanted = (read_all(layer)[0] for layer in layers[:2])
        step = {torch.float32: 0.0, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.int8: 1 / 127}
        step[INT4] = 2 / 15
        size = wanted.abs().amax(dim=2, keepdim=True)
        bound = step.get(dtype, 2**-3) * (size if dtype in (torch.int8, INT4) else wanted.abs())
        rounding = (head_dim / 16 + 24) * 2**-23 * size
        smallest = {torch.float8_e4m3fn: 2**-9, torch.float16: 2**-24, INT4: 2**-24}.get(dtype, 0.0)
        assert torch.all((stored - wanted).abs() <= bound * 1.01 + rounding + smallest)


@pytest.mark.parametrize("size", [32, 16, 8])
def test_four_bits_are_the_nearest_of_sixteen_from_the_least_to_the_largest(size: int) -> None:
    """A last group of every size, against a search of all sixteen."""
    head_dim = 32 + size
    heads = torch.randn(20, 3, head_dim) * 10.0 ** torch.arange(-2, 3).repeat(4)[:, None, None]
    layer = zeros(INT4, 2, 16, 1, head_dim)
    slots = torch.arange(20)
    half = head_dim // 2
    rotary.rotate_and_write(
        heads, slots.int(), torch.ones(20, half), torch.zeros(20, half), layer, slots.int(), 1
    )
    values, stored = heads[:, 2], layer.read(slots)[1][:, 0]
    for group in (slice(0, 32), slice(32, head_dim)):
        x, restored = values[:, group], stored[:, group]
        least, span = x.amin(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
        grid = least[..., None] + span[..., None] / 15 * torch.arange(16.0)
        nearest = (x[..., None] - grid).abs().amin(-1)
        # The least and the scale are rounded to eleven bits.
        assert ((restored - x).abs() <= nearest + 2**-11 * (least.abs() + 2 * span) + 2**-20).all()
        assert (restored.amax(1) - restored.amin(1)).allclose(span[:, 0], rtol=2**-10, atol=2**-20)


@pytest.mark.parametrize("dtype", [torch.int8, INT4])
def test_a_token_is_rotated_alike_alone_and_beside_others(dtype: torch.dtype) -> None:
    heads, (cosine, sine) = torch.randn(9, 10, 80), rotary_table(80)
    positions, slots = torch.arange(9, dtype=torch.int32), torch.arange(9, dtype=torch.int32)
    weight = torch.randn(80)
    together, alone = (empty_layer(dtype, 16, 2, 80) for _ in range(2))
    queries = rotary.rotate_and_write(
        heads.clone(), positions, cosine, sine, together, slots, 2, weight, weight, 1e-6
    )
    for i in range(9):
        part = (heads[i : i + 1].clone(), positions[i : i + 1], cosine, sine, alone, slots[i : i + 1])
        assert torch.equal(rotary.rotate_and_write(*part, 2, weight, weight, 1e-6)[0], queries[i])
    assert torch.equal(together.data, alone.data)


@pytest.mark.parametrize("dtype", CACHE_TYPES, ids=str)
def test_every_value_is_stored_as_torch_stores_it(dtype: torch.dtype) -> None:
    # All of a float's 16 upper bits with what rounds up, down and to even below them; fp8's own and those between.
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    patterns = torch.cat([upper + lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    between = (codes[1:] + codes[:-1]) / 2
    ties = torch.cat(
        (codes, between, between.nextafter(torch.tensor(1e9)), between.nextafter(torch.tensor(-1e9)))
    )
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    halves = halves[halves.isfinite()].sort().values
    middles = (halves[1:] + halves[:-1]) / 2
    values = torch.cat((patterns.int().view(torch.float32), ties, halves, middles))
    # Vectors of like size, so that int8's steps matter too.
    values = torch.cat((values.sort().values, torch.zeros(-len(values) % 256))).view(-1, 1, 256)
    heads = torch.cat((torch.zeros_like(values), torch.zeros_like(values), values), dim=1)
    count = len(values)
    layers = [zeros(dtype, -(-count // 16), 16, 1, 256) for _ in range(2)]
    words = torch.zeros(count, dtype=torch.int32)
    slots = torch.arange(count, dtype=torch.int32)
    rotary.rotate_and_write(heads, words, torch.ones(1, 128), torch.zeros(1, 128), layers[0], slots, 1)
    layers[1].write(slots.long(), values, values)
    stored, wanted = (layer.read(slots.long())[1] for layer in layers)
    if dtype == INT4:
        # Group by group: all of it as torch has it, or, of what is not finite or beyond fp16, nothing finite.
        stored, wanted = (x.view(-1, INT4_GROUP) for x in (stored, wanted))
        finite = wanted.isfinite().all(dim=1)
        assert finite.sum() > 1000
        assert torch.equal(stored[finite], wanted[finite])
        assert not stored[~finite].isfinite().any()
        groups = values.view(-1, INT4_GROUP)
        assert finite[groups.half().isfinite().all(dim=1)].all()
        assert not finite[~groups.isfinite().all(dim=1)].any()
        return
    if dtype != torch.int8:
        assert_same(stored, wanted)
        is_number = ~stored.isnan()
        assert torch.equal(stored.signbit()[is_number], wanted.signbit()[is_number])
        return
    finite = values[:, 0].isfinite().all(dim=1)
    assert torch.equal(stored[finite], wanted[finite])
    assert stored[~finite].isnan().all()
