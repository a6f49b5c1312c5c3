"""Clipping: each range against its definition written out, and never a worse grid where that is the promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.compression.clipping import kl_ranges, mse_ranges, percentile_ranges
from engine.quant.rounding import Ranges, full_ranges, round_to_nearest

KINDS = [(4, True), (4, False), (8, True)]


def with_outliers(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns)
    outliers = torch.rand(rows, columns) < 0.02
    return torch.where(outliers, weight * 15, weight)


def group_errors(
    weight: torch.Tensor,
    ranges: Ranges,
    bits: int,
    group_size: int,
    symmetric: bool,
    importance: torch.Tensor,
) -> list[float]:
    """The weighted squared error of each group, in double precision."""
    rounded = round_to_nearest(weight, bits, group_size, symmetric, ranges).dequantize()
    error = (rounded.double() - weight.double()).square() * importance.double()
    return [float(group) for part in error.split(group_size, dim=1) for group in part.sum(dim=1)]


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("group_size", [None, 32, 7, 1])
def test_percentile_is_numpy_s(percentile: float, group_size: int | None) -> None:
    weight = torch.randn(6, 75)
    ranges = percentile_ranges(weight, group_size, percentile)
    size = group_size or 75
    tail = (100 - percentile) / 2
    for group, start in enumerate(range(0, 75, size)):
        values = weight[:, start : start + size].double().numpy()
        low, high = np.percentile(values, [tail, 100 - tail], axis=1)
        # float32's precision, for values of up to about 4.
        np.testing.assert_allclose(ranges.low[:, group], low, atol=1e-6)
        np.testing.assert_allclose(ranges.high[:, group], high, atol=1e-6)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("group_size", [200, 32, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_is_never_worse_than_no_clipping(
    bits: int, symmetric: bool, group_size: int, weighted: bool
) -> None:
    weight = with_outliers(20, 200)
    importance = torch.rand(200).square() if weighted else torch.ones(200)
    clipped = mse_ranges(weight, group_size, bits, symmetric, importance if weighted else None)
    least = group_errors(weight, clipped, bits, group_size, symmetric, importance)
    full = group_errors(weight, full_ranges(weight, group_size), bits, group_size, symmetric, importance)
    # The sums that were compared are float32.
    assert all(a <= b * (1 + 1e-5) for a, b in zip(least, full, strict=True))
    # Eight bits leave less to gain, as do short groups.
    if bits == 4 and group_size == 200:
        assert sum(least) < 0.98 * sum(full)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_mse_is_the_least_of_all_factors(bits: int, symmetric: bool) -> None:
    weight, importance = with_outliers(8, 60), torch.rand(60)
    found = mse_ranges(weight, 24, bits, symmetric, importance, smallest=0.4, steps=6)
    full = full_ranges(weight, 24)
    tried = []
    for factor in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        ranges = Ranges(full.low * factor, full.high * factor)
        tried.append(group_errors(weight, ranges, bits, 24, symmetric, importance))
    least = [min(errors) for errors in zip(*tried, strict=True)]
    assert group_errors(weight, found, bits, 24, symmetric, importance) == pytest.approx(least, rel=1e-4)


def test_mse_minds_the_importance() -> None:
    weight = torch.randn(30, 128)
    weight[:, 5] = 12
    only_outlier, without_outlier = torch.zeros(128), torch.ones(128)
    only_outlier[5], without_outlier[5] = 1, 0
    kept = mse_ranges(weight, None, 4, True, only_outlier)
    assert torch.all((kept.high - 12).abs() <= 1)
    cut = mse_ranges(weight, None, 4, True, without_outlier)
    assert torch.all(cut.high < 4)


def divergence(counts: list[float], kept: int, levels: int) -> float:
    """The divergence of the first bins, from the two distributions written out."""
    reference = counts[:kept]
    reference[-1] += sum(counts[kept:])
    candidate = [0.0] * kept
    for level in range(levels):
        bins = range(level * kept // levels, (level + 1) * kept // levels)
        filled = [i for i in bins if counts[i] > 0]
        for i in filled:
            candidate[i] = sum(counts[j] for j in bins) / len(filled)
    total, result = sum(candidate), 0.0
    for p, q in zip(reference, candidate, strict=True):
        if p > 0:
            result += math.inf if q == 0 else p / sum(reference) * math.log(p / sum(reference) / (q / total))
    return result


@pytest.mark.parametrize("bits", [4, 8])
def test_kl_is_the_least_of_all_thresholds(bits: int) -> None:
    levels, bins = 2 ** (bits - 1), 160
    weight = torch.cat([with_outliers(4, 1000), torch.rand(2, 1000) * 3 + 1, torch.randn(2, 1000).exp() * -1])
    ranges = kl_ranges(weight, None, bits, bins)
    for row, values in enumerate(weight.double().numpy()):
        counts, edges = np.histogram(np.abs(values), bins=bins, range=(0, np.abs(values).max()))
        divergences = [
            divergence(counts.astype(float).tolist(), kept, levels) for kept in range(levels, bins + 1)
        ]
        limit = max(-float(ranges.low[row]), float(ranges.high[row]))
        found = int(np.argmin(np.abs(edges - limit)))
        assert limit == pytest.approx(edges[found], rel=1e-5)
        # A value on the edge of a bin may lie on either side of it, of one in a thousand values.
        assert divergences[found - levels] <= min(divergences) + 2e-3
    assert torch.all(ranges.low >= weight.amin(dim=1, keepdim=True))
    assert torch.all(ranges.high <= weight.amax(dim=1, keepdim=True))
    assert torch.all(ranges.low < ranges.high)


def test_kl_cuts_what_is_rare() -> None:
    weight = torch.randn(1, 200_000)
    weight[0, :3] = torch.tensor([12.0, -14.0, 11.0])
    ranges = kl_ranges(weight, None, 8)
    assert 3 < float(ranges.high) < 10
    assert float(ranges.low) == -float(ranges.high)


def test_kl_keeps_the_range_of_few_values() -> None:
    weight = with_outliers(5, 100)
    ranges, full = kl_ranges(weight, 64, 4, bins=64), full_ranges(weight, 64)
    # The first group has as many values as bins, the second fewer.
    assert torch.all(ranges.high[:, 0] < full.high[:, 0] * (1 + 1e-6))
    assert torch.equal(ranges.low[:, 1], full.low[:, 1])
    assert torch.equal(ranges.high[:, 1], full.high[:, 1])


FINDERS: dict[str, Callable[[torch.Tensor, int | None], Ranges]] = {
    "percentile": percentile_ranges,
    "mse": lambda weight, group_size: mse_ranges(weight, group_size, 4, False),
    "kl": lambda weight, group_size: kl_ranges(weight, group_size, 4, bins=16),
}


@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS)
@pytest.mark.parametrize(
    ("columns", "group_size"), [(1, None), (1, 32), (48, 32), (64, 32), (33, None), (40, 1)]
)
def test_ranges_lie_within_the_full_ones(
    find: Callable[[torch.Tensor, int | None], Ranges], columns: int, group_size: int | None
) -> None:
    weight = torch.randn(7, columns)
    ranges, full = find(weight, group_size), full_ranges(weight, group_size)
    assert ranges.low.shape == full.low.shape
    assert torch.all(ranges.low <= ranges.high)
    # A range on one side of 0 shrinks towards 0, beyond its end on that side.
    assert torch.all(ranges.low >= torch.minimum(full.low, torch.zeros(())))
    assert torch.all(ranges.high <= torch.maximum(full.high, torch.zeros(())))


@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS)
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_constants_keep_their_value(find: Callable[[torch.Tensor, int | None], Ranges], value: float) -> None:
    weight = torch.full((3, 40), value)
    rounded = round_to_nearest(weight, 4, 32, False, find(weight, 32))
    # What fp16 takes off the scale: half of 2^-10.
    assert torch.all((rounded.dequantize() - value).abs() <= abs(value) * 2**-11)


@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS)
def test_many_rows_are_as_few(
    find: Callable[[torch.Tensor, int | None], Ranges], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = with_outliers(23, 50)
    together = find(weight, 20)
    monkeypatch.setattr("engine.compression.clipping._CHUNK", 100)
    cut = find(weight, 20)
    assert torch.equal(together.low, cut.low)
    assert torch.equal(together.high, cut.high)


@pytest.mark.parametrize("find", FINDERS.values(), ids=FINDERS)
def test_what_is_not_finite_is_refused(find: Callable[[torch.Tensor, int | None], Ranges]) -> None:
    weight = torch.randn(5, 40)
    weight[3, 17] = float("nan")
    with pytest.raises(ValueError, match="row 3, column 17"):
        find(weight, 32)


def test_bad_options_are_refused() -> None:
    weight = torch.randn(3, 40)
    with pytest.raises(ValueError, match="percentile 0"):
        percentile_ranges(weight, 32, 0)
    with pytest.raises(ValueError, match="down to 0"):
        mse_ranges(weight, 32, 4, True, smallest=0)
    with pytest.raises(ValueError, match="100 bins for 128 levels"):
        kl_ranges(weight, None, 8, bins=100)
    with pytest.raises(ValueError, match="column 7"):
        mse_ranges(weight, 32, 4, True, torch.where(torch.arange(40) == 7, -1.0, 1.0))
    with pytest.raises(ValueError, match=r"must be \[40\]"):
        mse_ranges(weight, 32, 4, True, torch.ones(3))
    with pytest.raises(ValueError, match="zeros"):
        mse_ranges(weight, 32, 4, True, torch.zeros(40))
    weight[1, 35] = -1e6
    with pytest.raises(ValueError, match=r"group \(1, 1\)"):
        mse_ranges(weight, 32, 4, False)
