"""The CPU's attention in C: against attention written out, and a token's bits in every company it can have."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from engine.kernels import cpu
from engine.kernels.attention.dispatch import reference
from engine.kernels.attention.in_c import SEGMENT, CpuPlan, cpu_attention, group_segments
from engine.kernels.attention.kv_layer import CACHE_TYPES, INT4, INT4_GROUP, KVCache, KVLayer

WINDOWS = [None, 1, 5, 100, 256, 300]
"""Within a segment, a whole one, more than one."""

LENGTHS = [(37, 1), (0, 1), (0, 20), (11, 7), (250, 12), (SEGMENT - 1, 1), (SEGMENT, 1), (511, 70), (600, 1)]
"""Tokens before a chunk, and its own; chunks of one token are decodes. Most cross or touch a segment's end."""


@pytest.fixture(autouse=True)
def compiler() -> None:
    if cpu.library() is None:
        pytest.skip("there is no C compiler on this machine")


@dataclass(frozen=True, slots=True)
class Sequences:
    """A cache that holds some sequences, in blocks in random order; what nobody wrote is NaN.

    Attributes:
        tables: [S, W] int32.
    """

    layer: KVLayer
    tables: torch.Tensor

    @staticmethod
    def random(
        lengths: list[int], block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> Sequences:
        width = -(-max(lengths) // block_size)
        num_blocks = 1 + len(lengths) * width
        cpu_device = torch.device("cpu")
        cache = KVCache.allocate(1, num_blocks, block_size, kv_heads, head_dim, dtype, cpu_device)
        if cache.scales is None:
            cache.data.copy_(torch.full(cache.data.shape, torch.nan))
        else:
            cache.data.fill_(77)
            cache.scales.fill_(torch.nan)
        layer = cache.layer(0)
        tables = (torch.randperm(num_blocks - 1) + 1).int().view(len(lengths), width)
        held = Sequences(layer, tables)
        for sequence, length in enumerate(lengths):
            layer.write(held.slots(sequence, length), *torch.randn(2, length, kv_heads, head_dim))
        return held

    def slots(self, sequence: int, length: int) -> torch.Tensor:
        """Where a sequence's first positions lie, [length] int64."""
        positions, size = torch.arange(length), self.layer.block_size
        return self.tables[sequence].long()[positions // size] * size + positions % size

    def attend(
        self, queries: torch.Tensor, chunks: list[tuple[int, int, int]], scale: float, window: int | None
    ) -> torch.Tensor:
        """Attention of queries [T, heads, D] that come in chunks: sequence, first position, tokens."""
        ends = torch.tensor([0] + [size for _, _, size in chunks]).cumsum(0).int()
        starts = torch.tensor([start for _, start, _ in chunks], dtype=torch.int32)
        segments = starts // SEGMENT + 1
        plan = CpuPlan.make(
            num_sequences=torch.tensor([len(chunks)]),
            query_starts=ends,
            starts=starts,
            table_rows=torch.tensor([sequence for sequence, _, _ in chunks], dtype=torch.int32),
            block_tables=self.tables,
            partial_starts=(segments.cumsum(0) - segments).int(),
            max_segments=int(segments.sum()),
            num_heads=queries.shape[1],
            head_dim=queries.shape[2],
        )
        plan.partials.fill_(torch.nan)
        group_segments(plan, self.layer.block_size)
        return cpu_attention(queries, self.layer, plan, scale, window)


def on_int8_grids(layer: KVLayer) -> KVLayer:
    """What a cache is multiplied as: a vector of four bits on the int8 grid that holds all that they can stand for.

    A group's code c is (c * factor + offset) / 256 rounded down, factor and offset being its scale and its minimum in
    256ths of the vector's step, with half a step more.
    """
    if layer.dtype != INT4:
        return layer
    assert layer.scales is not None
    head_dim = 2 * layer.data.shape[-1]
    scale, minimum = layer.scales.float().unbind(-1)
    largest = torch.maximum(minimum.abs(), (minimum + 15 * scale).abs()).amax(-1)
    step = torch.where(largest > 0, largest / 127, 1.0)
    in_steps = 256 / step[..., None]
    codes = torch.empty(*layer.data.shape[:-1], head_dim, dtype=torch.int8)
    for d in range(head_dim):
        pair = layer.data[..., d // 2].int()
        code = pair // 16 if d % 2 else pair % 16
        group = d // INT4_GROUP
        factor = (scale * in_steps)[..., group].nan_to_num(0).round().int()
        offset = (minimum * in_steps)[..., group].nan_to_num(0).round().int() + 128
        codes[..., d] = (code * factor + offset).div(256, rounding_mode="floor").to(torch.int8)
    return KVLayer(codes, step)


def tolerance(dtype: torch.dtype) -> float:
    """For values of size 1 to 5: weights are off by a few units of what float32 makes of scores up to 10.

    Over a cache of codes a query has 15 bits, which moves a score by 1e-4, and a weight 14; without their low terms
    both would be off by more than 0.01.
    """
    return 1e-3 if dtype in (torch.int8, INT4) else 2e-5


@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("head_dim", [24, 64, 80, 96, 128, 256])
def test_equals_attention_written_out(head_dim: int, group: int) -> None:
    kv_heads, scale = 2, head_dim**-0.5
    chunks = [(i, start, size) for i, (start, size) in enumerate(LENGTHS)]
    # Queries as they come: beside keys and values that nobody wants.
    heads = torch.randn(sum(size for _, size in LENGTHS), (group + 2) * kv_heads, head_dim) * 2
    queries = heads[:, : group * kv_heads]
    for case, dtype in enumerate(CACHE_TYPES):
        # Every type meets every window and block size, not for every shape.
        case += head_dim // 8 + group
        block_size, window = (4, 16)[case % 2], WINDOWS[case % len(WINDOWS)]
        lengths = [start + size for start, size in LENGTHS]
        held = Sequences.random(lengths, block_size, kv_heads, head_dim, dtype)
        output = held.attend(queries, chunks, scale, window)
        multiplied = on_int8_grids(held.layer)
        first = 0
        for sequence, start, size in chunks:
            expected = reference(
                queries[first : first + size], multiplied, held.tables[sequence], start, scale, window
            )
            torch.testing.assert_close(
                output[first : first + size], expected, rtol=1e-5, atol=tolerance(dtype)
            )
            first += size


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"),
    [
        (torch.float32, 64, 3),
        (torch.bfloat16, 24, 7),
        (torch.float16, 80, 1),
        (torch.int8, 128, 3),
        (torch.float8_e4m3fn, 256, 1),
        (INT4, 64, 3),
        (INT4, 80, 2),
    ],
    ids=str,
)
def test_a_token_is_the_same_in_any_chunk_and_company(
    dtype: torch.dtype, head_dim: int, group: int, window: int | None
) -> None:
    length = 601
    held = Sequences.random([length, 40], 16, 2, head_dim, dtype)
    queries = torch.randn(length, 2 * group, head_dim) * 2

    def attend(sizes: list[int]) -> torch.Tensor:
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        chunks = [(0, start, size) for start, size in zip(starts, sizes, strict=False)]
        return held.attend(queries, chunks, 0.1, window)

    # All tokens as decodes of so many sequences, which share the blocks.
    decodes = attend([1] * length)
    assert decodes.isfinite().all()
    for sizes in (
        [length],
        [255, 1, 1, 254, 90],
        [256, 256, 89],
        [257, 255, 1, 88],
        [7] * 85 + [6],
        [64, 65, 63, 2, 400, 7],
    ):
        assert torch.equal(attend(sizes), decodes)
    others = torch.randn(40, 2 * group, head_dim)
    for first, size in [
        (0, 1),
        (255, 1),
        (256, 1),
        (257, 1),
        (512, 1),
        (600, 1),
        (0, 3),
        (250, 9),
        (500, 101),
    ]:
        part = queries[first : first + size]
        alone = held.attend(part, [(0, first, size)], 0.1, window)
        assert torch.equal(alone, decodes[first : first + size])
        beside = torch.cat((others[:30], part, others[30:]))
        chunks = [(1, 0, 30), (0, first, size), *[(1, 30 + i, 1) for i in range(10)]]
        assert torch.equal(held.attend(beside, chunks, 0.1, window)[30:-10], alone)


@pytest.mark.parametrize("head_dim", [12, 24, 64, 80, 128, 256])
def test_four_bits_are_multiplied_as_the_int8_codes_that_they_stand_for(head_dim: int) -> None:
    held = Sequences.random([601], 16, 2, head_dim, INT4)
    # Keys with a few large elements, as models have them, in whole groups and beside small ones; and none at all.
    keys, values = torch.randn(2, 601, 2, head_dim)
    keys[..., 3::7] *= 20
    keys[40:60] += 100
    keys[5], values[6] = 0, 1.5
    held.layer.write(held.slots(0, 601), keys, values)
    queries = torch.randn(601, 6, head_dim)
    as_int8 = Sequences(on_int8_grids(held.layer), held.tables)
    for chunks in ([(0, 0, 601)], [(0, i, 1) for i in range(601)]):
        expected = as_int8.attend(queries, chunks, 0.02, None)
        assert expected.isfinite().all()
        assert torch.equal(held.attend(queries, chunks, 0.02, None), expected)


def test_the_int8_grid_adds_little_to_what_four_bits_lose() -> None:
    """Half a step of 127 to the largest of the vector, beside half of one of 15 from end to end of the group."""
    held = Sequences.random([2000], 16, 2, 64, INT4)
    written = torch.randn(2, 2000, 2, 64)
    held.layer.write(held.slots(0, 2000), *written)
    exact = held.layer.read(held.slots(0, 2000))
    multiplied = on_int8_grids(held.layer).read(held.slots(0, 2000))
    for x, stored, used in zip(written, exact, multiplied, strict=True):
        error, added = (stored - x).square().mean().sqrt(), (used - stored).square().mean().sqrt()
        assert 0.05 < error < 0.12
        assert 0 < added < 0.1 * error
        # And what both lose is no more than that of two roundings that know nothing of each other.
        assert (used - x).square().mean().sqrt() < 1.02 * (error**2 + added**2).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, INT4])
def test_bits_do_not_depend_on_the_blocks(dtype: torch.dtype) -> None:
    keys_and_values, queries = torch.randn(2, 300, 2, 64), torch.randn(300, 6, 64)
    outputs = []
    for block_size in (1, 4, 16, 256):
        held = Sequences.random([300], block_size, 2, 64, dtype)
        held.layer.write(held.slots(0, 300), *keys_and_values)
        outputs.append(held.attend(queries, [(0, 0, 300)], 0.1, None))
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, INT4])
@pytest.mark.parametrize("factor", [0.0, 1e-30, 100.0, 1e15])
def test_scores_of_any_size(factor: float, dtype: torch.dtype) -> None:
    """All equal; one far above the others, in this segment or another."""
    held = Sequences.random([600], 16, 1, 64, dtype)
    queries = torch.randn(600, 2, 64) * factor
    chunk = held.attend(queries, [(0, 0, 600)], 1.0, None)
    multiplied = on_int8_grids(held.layer)
    expected = reference(queries, multiplied, held.tables[0], 0, 1.0)
    # A score's own rounding decides between keys whose scores are nearly equal: those few are left out.
    keys = multiplied.read(held.slots(0, 600))[0][:, 0]
    scores = torch.einsum("qhd,kd->hqk", queries.double(), keys.double())
    scores = scores.masked_fill(torch.ones(600, 600).triu(1).bool(), -torch.inf)
    best = scores.topk(2, dim=2).values[:, 1:]
    rounding = 1e-6 if dtype == torch.float32 else 1e-3
    is_clear = (best[..., 0] - best[..., 1] > rounding * best[..., 0].abs() + 20).all(dim=0)
    is_compared = torch.cat((torch.tensor([True]), is_clear)) if factor >= 100 else torch.ones(600).bool()
    assert is_compared.sum() > 100
    torch.testing.assert_close(chunk[is_compared], expected[is_compared], rtol=1e-5, atol=tolerance(dtype))
    decodes = held.attend(queries, [(0, i, 1) for i in range(600)], 1.0, None)
    assert torch.equal(chunk, decodes)


@pytest.mark.parametrize("half", ["key", "value"])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, torch.nan),
        (torch.float32, torch.inf),
        (torch.int8, torch.nan),
        (INT4, torch.nan),
        (INT4, torch.inf),
    ],
)
def test_what_is_not_finite_shows_from_its_token_on(dtype: torch.dtype, value: float, half: str) -> None:
    held = Sequences.random([300, 300], 16, 1, 64, dtype)
    position = 130
    slot = int(held.slots(0, 300)[position])
    stored = held.layer.data if held.layer.scales is None else held.layer.scales
    stored[0 if half == "key" else 1].flatten(0, 1)[slot] = value
    queries = torch.randn(600, 2, 64)
    chunks = [(0, 0, 300), (1, 0, 300)]
    is_finite = held.attend(queries, chunks, 0.1, None).isfinite()
    assert is_finite[:position].all()
    assert not is_finite[position:300].all(dim=1).any()
    assert is_finite[300:].all()
    decodes = [(0, i, 1) for i in range(300)]
    assert torch.equal(held.attend(queries[:300], decodes, 0.1, None).isfinite(), is_finite[:300])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_query_that_is_not_finite_stays_alone(value: float) -> None:
    for dtype in (torch.float32, torch.int8, INT4):
        held = Sequences.random([300], 16, 1, 64, dtype)
        queries = torch.randn(300, 2, 64)
        queries[130, 1, 7] = value
        is_finite = held.attend(queries, [(0, 0, 300)], 0.1, None).view(300, 2, 64).isfinite()
        assert not is_finite[130, 1].any()
        is_finite[130, 1] = True
        assert is_finite.all()
