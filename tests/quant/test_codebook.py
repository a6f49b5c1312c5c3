"""Codebooks: NF4's published constants, and k-means against exhaustive search and evenly spaced grids."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.quant.codebook import cluster_rows, nf4_values, round_to_nf4
from engine.quant.rounding import round_to_nearest
from engine.quant.weight import CodebookWeight

# Appendix E of the QLoRA paper.
PUBLISHED_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def with_outliers(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    outliers = torch.rand(rows, columns) < 0.01
    return torch.where(outliers, weight * 15, weight)


def errors(weight: torch.Tensor, rounded: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """The weighted squared error of each row, [N] float64."""
    return ((rounded.double() - weight.double()).square() * importance.double()).sum(dim=1)


def test_nf4_is_the_published_table() -> None:
    # The table was computed in float32, with quantiles of single precision.
    assert nf4_values().tolist() == pytest.approx(PUBLISHED_NF4, abs=2e-7)


@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (100, 64), (7, 64), (1, 64), (9, 4)])
def test_nf4_takes_the_nearest_value(columns: int, block_size: int) -> None:
    weight = torch.randn(6, columns)
    rounded = round_to_nf4(weight, block_size)
    assert rounded.shape == weight.shape
    assert rounded.codes.dtype == torch.uint8
    values = rounded.dequantize()
    for start in range(0, columns, block_size):
        block = weight[:, start : start + block_size]
        absmax = block.abs().amax(dim=1)
        assert rounded.scale is not None
        assert torch.equal(rounded.scale[:, start // block_size], absmax)
        choices = torch.tensor(PUBLISHED_NF4) * absmax[:, None]
        nearest = (block[:, :, None] - choices[:, None, :]).abs().amin(dim=2)
        distance = (block - values[:, start : start + block_size]).abs()
        # Where two values are nearly as near, float32 may choose either.
        assert torch.all(distance <= nearest + 1e-6 * absmax[:, None])


def test_nf4_keeps_its_values() -> None:
    codes = torch.randint(0, 16, (5, 128), dtype=torch.uint8)
    codes[:, [0, 64]] = 15
    absmax = torch.rand(5, 2) + 0.1
    weight = nf4_values()[codes.long()] * absmax.repeat_interleave(64, dim=1)
    rounded = round_to_nf4(weight)
    assert torch.equal(rounded.codes, codes)
    assert torch.equal(rounded.dequantize(), weight)


def test_nf4_of_zeros_is_zero() -> None:
    weight = torch.randn(3, 128)
    weight[1, 64:] = 0
    values = round_to_nf4(weight).dequantize()
    assert torch.equal(values[1, 64:], torch.zeros(64))
    assert torch.all(values[1, :64].abs().amax() > 0)


def test_nf4_suits_normal_values_better_than_even_steps() -> None:
    weight = torch.randn(64, 1024)
    ones = torch.ones(1024)
    even = errors(weight, round_to_nearest(weight, 4, 64, True).dequantize(), ones).sum()
    assert errors(weight, round_to_nf4(weight).dequantize(), ones).sum() < 0.9 * even


def least_distortion(values: list[float], weights: list[float], clusters: int) -> float:
    """The optimum of one-dimensional k-means: in order, each cluster is a run of values."""
    pairs = sorted(zip(values, weights, strict=True))
    count = len(pairs)
    cost = [[0.0] * (count + 1) for _ in range(count + 1)]
    for start in range(count):
        weight = moment = square = 0.0
        for end in range(start + 1, count + 1):
            value, factor = pairs[end - 1]
            weight, moment, square = weight + factor, moment + factor * value, square + factor * value * value
            cost[start][end] = max(square - moment * moment / weight, 0.0)
    least = [0.0] + [float("inf")] * count
    for _ in range(clusters):
        least = [min(least[start] + cost[start][end] for start in range(end + 1)) for end in range(count + 1)]
    return least[count]


@pytest.mark.parametrize("weighted", [False, True])
def test_codes_are_the_nearest_of_the_stored_codebook(weighted: bool) -> None:
    weight = with_outliers(40, 300)
    rounded = cluster_rows(weight, torch.rand(300) if weighted else None)
    assert rounded.shape == weight.shape
    assert (rounded.codes.dtype, rounded.codebook.dtype) == (torch.uint8, torch.float16)
    assert rounded.codebook.shape == (40, 16)
    assert torch.all(rounded.codebook.diff(dim=1) >= 0)
    distances = (weight[:, :, None].double() - rounded.codebook[:, None, :].double()).abs()
    own = (weight.double() - rounded.dequantize().double()).abs()
    # A border between two values is a float32.
    assert torch.all(own <= distances.amin(dim=2) + 1e-6 * weight.abs().double())


@pytest.mark.parametrize("kind", ["normal", "outliers", "heavy", "uniform", "skewed"])
@pytest.mark.parametrize("columns", [40, 576, 2048])
@pytest.mark.parametrize("weighted", [False, True])
def test_clusters_are_not_above_even_steps(kind: str, columns: int, weighted: bool) -> None:
    weight = {
        "normal": torch.randn(24, columns),
        "outliers": with_outliers(24, columns),
        "heavy": torch.randn(24, columns) / torch.rand(24, columns).clamp(min=0.01),
        "uniform": torch.rand(24, columns) - 0.5,
        "skewed": torch.randn(24, columns).exp(),
    }[kind]
    importance = torch.rand(columns) + 0.01 if weighted else torch.ones(columns)
    clusters = errors(weight, cluster_rows(weight, importance if weighted else None).dequantize(), importance)
    even = round_to_nearest(weight, 4, None, False, scale_dtype=torch.float32).dequantize()
    assert torch.all(clusters <= errors(weight, even, importance))
    if kind != "uniform":
        assert clusters.sum() < 0.8 * errors(weight, even, importance).sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("columns", "rows", "excess"),
    # Up to 128 values the start is the optimum: what is left is the codebook's rounding to fp16.
    [(1, 3, 0.0), (10, 3, 0.0), (20, 20, 0.02), (48, 20, 0.01), (128, 4, 0.005), (300, 3, 0.03)],
)
def test_clusters_are_the_optimum_s(columns: int, rows: int, excess: float, weighted: bool) -> None:
    weight = torch.cat((torch.randn(rows, columns), with_outliers(rows, columns)))
    importance = torch.rand(columns) + 0.1 if weighted else torch.ones(columns)
    found = errors(weight, cluster_rows(weight, importance).dequantize(), importance)
    for row, error in zip(weight.double().tolist(), found.tolist(), strict=True):
        least = least_distortion(row, importance.double().tolist(), 16)
        rounding = sum((value * 2**-11) ** 2 for value in row) * float(importance.max())
        assert least * (1 - 1e-6) - 1e-12 <= error <= least * (1 + excess) + rounding


@pytest.mark.parametrize("columns", [1, 16, 100, 3000])
@pytest.mark.parametrize("different", [1, 2, 16])
def test_sixteen_different_values_are_kept(columns: int, different: int) -> None:
    # One value in a hundred is rare: quantiles would miss it.
    choices = torch.randn(different).half().float()
    choices[-1] *= 16
    weight = choices[torch.randint(0, max(different - 1, 1), (5, columns))]
    weight[:, columns // 2] = choices[-1]
    for importance in (None, torch.rand(columns)):
        assert torch.equal(cluster_rows(weight, importance).dequantize(), weight)


def test_a_codebook_s_own_values_are_kept() -> None:
    codebook = torch.randn(7, 16).half().sort(dim=1).values
    weight = CodebookWeight(torch.randint(0, 16, (7, 500), dtype=torch.uint8), codebook, None, 500)
    assert torch.equal(cluster_rows(weight.dequantize()).dequantize(), weight.dequantize())


def test_zeros_stay_zeros() -> None:
    weight = torch.randn(4, 300)
    weight[2] = 0
    rounded = cluster_rows(weight).dequantize()
    assert torch.equal(rounded[2], torch.zeros(300))
    assert torch.all(rounded[[0, 1, 3]].abs().amax(dim=1) > 0)


def test_clusters_mind_the_importance() -> None:
    weight, importance = torch.randn(10, 400), torch.full((400,), 1e-3)
    importance[100:116] = 1
    rounded = cluster_rows(weight, importance).dequantize()
    plain = cluster_rows(weight).dequantize()
    important = slice(100, 116)
    error, before = (errors(weight[:, important], x[:, important], torch.ones(16)) for x in (rounded, plain))
    assert error.sum() < 0.2 * before.sum()


def test_unimportant_columns_are_only_assigned() -> None:
    weight = torch.randn(10, 64)
    importance = (torch.arange(64) < 16).float()
    rounded = cluster_rows(weight, importance).dequantize()
    # Sixteen columns count, and each has its value but for fp16's rounding.
    assert torch.all((rounded - weight)[:, :16].abs() <= weight[:, :16].abs() * 2**-11)


def test_a_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = with_outliers(70, 300)
    together = cluster_rows(weight)
    monkeypatch.setattr("engine.quant.codebook._VALUES", 1000)
    cut = cluster_rows(weight)
    assert torch.equal(together.codes, cut.codes)
    assert torch.equal(together.codebook, cut.codebook)
    assert torch.equal(cluster_rows(weight[41:42]).codes, together.codes[41:42])


@pytest.mark.parametrize("quantize", [cluster_rows, round_to_nf4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(
    quantize: Callable[[torch.Tensor], CodebookWeight], value: float
) -> None:
    weight = torch.randn(5, 70)
    weight[3, 17] = value
    with pytest.raises(ValueError, match="row 3, column 17"):
        quantize(weight)


def test_bad_values_are_refused() -> None:
    weight = torch.randn(3, 40)
    with pytest.raises(ValueError, match="column 7"):
        cluster_rows(weight, torch.where(torch.arange(40) == 7, float("nan"), 1.0))
    with pytest.raises(ValueError, match=r"must be \[40\]"):
        cluster_rows(weight, torch.ones(3, 40))
    with pytest.raises(ValueError, match="group size 0"):
        round_to_nf4(weight, 0)
    weight[2, 30] = 70_000
    with pytest.raises(ValueError, match="row 2, column 30"):
        cluster_rows(weight)
