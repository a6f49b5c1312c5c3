"""The sampling kernels against the CPU's bodies: thresholds and tokens alike, whatever shares the batch."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
import triton
import triton.language as tl

from engine.core.random import draw_key
from engine.kernels import sample
from engine.kernels.launch import Tile, launch
from engine.kernels.noise import gumbel_noise, uniform_noise
from engine.kernels.sample import Adjustments, DrawParameters
from tests.helpers.logits import random_logits

SMALL_ROW_TILE = Tile({"BLOCK": 1024}, num_warps=4, num_stages=1)
FILTERS = [
    (1, 1.0, 0.0),
    (20, 1.0, 0.0),
    (700, 1.0, 0.0),
    (10**6, 1.0, 0.0),
    (0, 0.05, 0.0),
    (0, 0.9, 0.0),
    (0, 0.999, 0.0),
    (0, 1.0, 0.05),
    (0, 1.0, 1.0),
    (50, 0.8, 0.0),
    (50, 1.0, 0.2),
    (0, 0.7, 0.01),
    (300, 0.95, 0.02),
    (0, 1.0, 0.0),
]


def parameters(
    num_rows: int,
    temperature: list[float] | float = 1.0,
    filters: list[tuple[int, float, float]] | None = None,
    seed: int = 0,
) -> DrawParameters:
    keys = torch.tensor([draw_key(seed, 0, row) for row in range(num_rows)], dtype=torch.int32)
    temperatures = temperature if isinstance(temperature, list) else [temperature] * num_rows
    top_k, top_p, min_p = zip(*(filters or [(0, 1.0, 0.0)] * num_rows), strict=True)
    return DrawParameters(
        key_low=keys[:, 0].contiguous(),
        key_high=keys[:, 1].contiguous(),
        temperature=torch.tensor(temperatures, dtype=torch.float32),
        top_k=torch.tensor(top_k, dtype=torch.int32),
        top_p=torch.tensor(top_p, dtype=torch.float32),
        min_p=torch.tensor(min_p, dtype=torch.float32),
    )


def row_of(of: DrawParameters, row: int) -> DrawParameters:
    return DrawParameters(*(column[row : row + 1].clone() for column in astuple(of)))


@pytest.mark.parametrize(
    ("kind", "vocab_size"),
    [
        ("normal", 77),
        ("rounded", 1_500),
        ("tied", 1_500),
        ("equal", 77),
        ("flat", 1_500),
        ("masked", 1_500),
        ("wide", 77),
    ],
)
def test_filters_keep_what_the_reference_keeps(kind: str, vocab_size: int) -> None:
    logits = random_logits(kind, len(FILTERS), vocab_size)
    temperatures = [(0.3, 0.8, 1.0, 2.0)[row % 4] for row in range(len(FILTERS))]
    how = parameters(len(FILTERS), temperatures, FILTERS)
    measured = sample.find_thresholds(logits, how, row_tile=SMALL_ROW_TILE)
    expected = sample.reference_thresholds(logits, how)
    kept, reference = logits >= measured[:, None], logits >= expected[:, None]
    assert torch.equal(kept, reference), (kept.sum(1), reference.sum(1))
    assert reference.any(dim=1).all()
    assert kind == "equal" or not reference.all()


def test_filters_over_a_large_vocabulary() -> None:
    """Every loop runs more than once: 33,000 logits have 1,032 maxima."""
    filters = [(5_000, 1.0, 0.0), (0, 0.7, 0.0)]
    logits = random_logits("normal", len(filters), 33_001)
    how = parameters(len(filters), 0.7, filters)
    measured = sample.find_thresholds(logits, how, row_tile=SMALL_ROW_TILE)
    expected = sample.reference_thresholds(logits, how)
    assert torch.equal(logits >= measured[:, None], logits >= expected[:, None])


def test_top_p_counts_the_mass_of_equal_logits_at_the_edge_of_top_k() -> None:
    """e + 10 are left of the largest, e times as likely as ten others, each of which lies in a group of its own."""
    logits = torch.zeros(2, 1_000)
    logits[:, 5] = 2.0
    logits[:, 40:360:32] = 1.0
    how = parameters(2, 1.0, [(3, 0.20, 0.0), (3, 0.25, 0.0)])
    assert sample.find_thresholds(logits, how, row_tile=SMALL_ROW_TILE).tolist() == [2.0, 1.0]
    assert sample.reference_thresholds(logits, how).tolist() == [2.0, 1.0]


def test_greedy_rows_and_broken_ones_end_the_search() -> None:
    logits = random_logits("normal", 5, 300)
    logits[1, 7] = math.nan
    logits[2, 7] = math.inf
    logits[3] = -math.inf
    logits[4, :200] = math.nan
    filters = [(3, 0.5, 0.1)] * 5
    how = parameters(5, [0.0, 1.0, 1.0, 1.0, 1.0], filters)
    tokens = sample.draw_tokens(logits, how, filters=True)
    assert tokens.tolist() == [int(logits[0].argmax()), -1, -1, -1, -1]
    assert torch.equal(sample.reference(logits, how), tokens)


@pytest.mark.parametrize(("num_rows", "kind"), [(1, "tied"), (3, "normal"), (17, "tied")])
def test_tokens_are_the_references(num_rows: int, kind: str) -> None:
    logits = random_logits(kind, num_rows, 600)
    temperatures = [(0.0, 1e-5, 0.7, 1.0, 2.0)[(row + 3) % 5] for row in range(num_rows)]
    how = parameters(num_rows, temperatures, (FILTERS * 2)[:num_rows], seed=3)
    expected = sample.reference(logits, how)
    assert torch.equal(sample.draw_tokens(logits, how, filters=True), expected)
    assert len(set(expected.tolist())) > num_rows // 2
    plain = parameters(num_rows, temperatures, seed=4)
    expected = sample.reference(logits, plain)
    for block in (256, 2048):
        tile = Tile({"BLOCK": block}, num_warps=4, num_stages=1)
        assert torch.equal(sample.draw_tokens(logits, plain, filters=False, tile=tile), expected)
    assert torch.equal(sample.draw_tokens(logits, plain, filters=True), expected)


def test_a_row_alone_draws_as_in_a_batch() -> None:
    logits = random_logits("rounded", 3, 700)
    how = parameters(3, [0.9, 0.5, 2.0], [(50, 0.8, 0.0), (0, 0.9, 0.0), (9, 1.0, 0.0)], seed=8)
    together = sample.draw_tokens(logits, how, filters=True)
    thresholds = sample.find_thresholds(logits, how)
    for row in range(3):
        alone = logits[row : row + 1].clone()
        assert torch.equal(sample.draw_tokens(alone, row_of(how, row), filters=True), together[row : row + 1])
        assert torch.equal(sample.find_thresholds(alone, row_of(how, row)), thresholds[row : row + 1])


def test_among_equals_the_lowest_token_id_wins() -> None:
    """At 1e30 the noise is lost in rounding, and a draw is a choice among equals too."""
    logits = torch.zeros(4, 1_003)
    logits[:, [701, 9, 42, 1_002]] = 1e30
    how = parameters(4, [0.0, 1.0, 1.0, 2.0], [(0, 1.0, 0.0), (0, 1.0, 0.0), (2, 0.5, 0.0), (0, 1.0, 0.3)])
    tile = Tile({"BLOCK": 512}, num_warps=4, num_stages=1)
    assert sample.draw_tokens(logits, how, filters=True, tile=tile).tolist() == [9] * 4


def test_extreme_temperatures() -> None:
    logits = random_logits("normal", 3, 500)
    logits[1] *= 1e34
    # 1e34 / 1e-5 is beyond float32: nothing can be drawn from an infinite score.
    how = parameters(3, [1e-5, 1e-5, 1e-5], [(0, 0.9, 0.0)] * 3)
    assert sample.draw_tokens(logits, how, filters=True).tolist() == [
        int(logits[0].argmax()),
        -1,
        int(logits[2].argmax()),
    ]
    assert torch.equal(sample.reference(logits, how), sample.draw_tokens(logits, how, filters=True))


def test_tokens_reach_their_rows_of_the_table() -> None:
    logits = random_logits("normal", 4, 100)
    logits[2, 3] = math.nan
    how = parameters(4, 0.0)
    best = logits.argmax(dim=1).tolist()
    for body in ("triton", "cpu"):
        table = torch.full((6,), 99, dtype=torch.int32)
        rows = torch.tensor([5, -1, 0, 3], dtype=torch.int32)
        if body == "triton":
            tokens = sample.draw_tokens(logits, how, filters=False, last_tokens=table, table_rows=rows)
        else:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sample, "target_of", lambda _: None)
                tokens = sample.draw_tokens(logits, how, filters=False, last_tokens=table, table_rows=rows)
        assert tokens.tolist() == [best[0], best[1], -1, best[3]]
        assert table.tolist() == [0, 99, 99, best[3], 99, best[0]]


def test_adjustments_equal_the_references_to_the_bit() -> None:
    logits = random_logits("normal", 3, 500)
    num_entries = 601
    cells = torch.randperm(1_500, generator=torch.Generator().manual_seed(0))[:num_entries]
    numbers = torch.rand(3, num_entries, generator=torch.Generator().manual_seed(1))
    entries = Adjustments(
        rows=(cells // 500).int(),
        token_ids=(cells % 500).int(),
        bias=torch.where(numbers[0] < 0.1, -math.inf, numbers[0] * 4 - 2),
        repetition=numbers[1] * 2 + 0.1,
        subtract=numbers[2] * 2 - 1,
    )
    measured, expected = logits.clone(), logits.clone()
    sample.adjust_logits(measured, entries)
    sample.reference_adjust(expected, entries)
    assert torch.equal(measured, expected)
    assert int((measured != logits).sum()) == num_entries


@pytest.mark.parametrize("vocab_size", [31, 500, 2049])
def test_a_mask_bans_what_the_reference_bans(vocab_size: int) -> None:
    logits = random_logits("normal", 3, vocab_size)
    source = torch.Generator().manual_seed(0)
    allowed = torch.randint(-(2**31), 2**31, (3, -(-vocab_size // 32)), generator=source, dtype=torch.int32)
    measured, expected = logits.clone(), logits.clone()
    sample.mask_logits(measured, allowed)
    sample.reference_mask(expected, allowed)
    assert torch.equal(measured, expected)
    assert 0 < int(torch.isinf(measured).sum()) < measured.numel()


def test_an_entry_outside_the_vocabulary_touches_nothing() -> None:
    logits = torch.zeros(2, 10)
    entries = Adjustments(
        rows=torch.tensor([0, 0], dtype=torch.int32),
        token_ids=torch.tensor([10, -1], dtype=torch.int32),
        bias=torch.ones(2),
        repetition=torch.ones(2),
        subtract=torch.zeros(2),
    )
    sample.adjust_logits(logits, entries)
    assert torch.equal(logits, torch.zeros(2, 10))


@triton.jit
def _uniform_kernel(out, key_low, key_high, first, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, sample._uniform(first + offsets, tl.load(key_low), tl.load(key_high)))


@triton.jit
def _gumbel_kernel(uniform, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, sample._gumbel(tl.load(uniform + offsets)))


def test_the_uniform_noise_equals_the_references_to_the_bit() -> None:
    block = 65_536
    tile = Tile({"BLOCK": block}, num_warps=4, num_stages=1)
    for seed, first in [(0, 0), (-(2**63), 200_000), (12345, 2**31 - block)]:
        key = draw_key(seed, 1, 2)
        out = torch.empty(block)
        words = [torch.tensor([word], dtype=torch.int32) for word in key]
        launch(
            _uniform_kernel,
            (1,),
            {"out": out, "key_low": words[0], "key_high": words[1], "first": first},
            tile,
        )
        assert torch.equal(out, uniform_noise(key, torch.arange(first, first + block)))


def test_the_noise_is_as_exact_as_float32_allows() -> None:
    u = uniform_noise(draw_key(0, 0, 0), torch.arange(65_536))
    powers = 2.0 ** torch.arange(-33.0, 0.0)
    edges = torch.cat([powers, powers * 1.3, 1 - powers.clamp(min=2.0**-24)])
    u[: len(edges)] = edges
    out = torch.empty_like(u)
    launch(_gumbel_kernel, (1,), {"uniform": u, "out": out}, Tile({"BLOCK": 65_536}, 4, 1))
    expected = -torch.log(-torch.log1p(-u.double()))
    # E = -log(1 - u) comes within 4 units of its last place (two for each logarithm); the noise -log E adds
    # the relative error of E as an absolute one, and its own rounding.
    unit = 2.0**-23
    assert torch.all((out - expected).abs() <= 4 * unit + 2 * unit * expected.abs())
    key = draw_key(5, 0, 0)
    noise = gumbel_noise(key, torch.arange(65_536))
    launch(
        _gumbel_kernel,
        (1,),
        {"uniform": uniform_noise(key, torch.arange(65_536)), "out": out},
        Tile({"BLOCK": 65_536}, 4, 1),
    )
    assert torch.allclose(out, noise, rtol=2 * unit, atol=4 * unit)


def test_draws_follow_the_softmax() -> None:
    """Chi-square over 300 draws from 6 of 8 tokens."""
    num_draws = 300
    logits = torch.tensor([0.0, 1.0, -math.inf, 1.5, 0.3, -0.4, -math.inf, 0.9])
    how = parameters(num_draws, 1.3, seed=77)
    tile = Tile({"BLOCK": 8}, num_warps=1, num_stages=1)
    tokens = sample.draw_tokens(logits.repeat(num_draws, 1), how, filters=False, tile=tile)
    counts = torch.bincount(tokens.long(), minlength=8)
    possible = logits.isfinite()
    assert counts[~possible].sum() == 0
    expected = torch.softmax(logits[possible] / 1.3, dim=0) * num_draws
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    # Five degrees of freedom: above 20.5 once in a thousand; the keys are fixed.
    assert statistic < 20.5


@pytest.mark.parametrize("num", [0, 5])
def test_logprobs(num: int) -> None:
    logits = random_logits("normal", 3, 9_000)
    logits[1, 100:] = -math.inf
    tokens = torch.tensor([17, 99, -1], dtype=torch.int32)
    measured = sample.logprobs_of(logits, tokens, [num] * 3)
    expected = torch.log_softmax(logits.double(), dim=1)
    for row in range(2):
        chosen = expected[row, tokens[row]]
        # Sums of 9,000 float32 masses, at most 2 * 14 roundings deep, and a logarithm of about 10.
        assert float(measured.chosen[row]) == pytest.approx(float(chosen), abs=1e-5)
        assert int(measured.ranks[row]) == int((expected[row] > chosen).sum()) + 1
        values, ids = expected[row].topk(num)
        assert measured.top_ids[row].tolist() == ids.tolist()
        assert measured.top_values[row].tolist() == pytest.approx(values.tolist(), abs=1e-5)
