"""Scale tuning: less error at the outputs, never more for any row, and the same result again."""

from __future__ import annotations

import pytest
import torch

from engine.compression.scale_tuning import tune_scales
from engine.quant.weight import GridWeight

GROUP_SIZE = 32


def round_to_nearest(values: torch.Tensor) -> GridWeight:
    codes, scales, minimums = [], [], []
    for group in values.split(GROUP_SIZE, dim=1):
        minimum = group.amin(dim=1).half()
        scale = ((group.amax(dim=1) - minimum) / 15).half()
        divisor = torch.where(scale > 0, scale, 1)[:, None].float()
        codes.append(((group - minimum[:, None]) / divisor).round().clamp(0, 15).to(torch.uint8))
        scales.append(scale)
        minimums.append(minimum)
    return GridWeight(torch.cat(codes, 1), torch.stack(scales, 1), torch.stack(minimums, 1), GROUP_SIZE)


def correlated_inputs(tokens: int, columns: int) -> torch.Tensor:
    mixed = torch.randn(tokens, columns // 4).double() @ torch.randn(columns // 4, columns).double()
    return mixed + torch.randn(tokens, columns)


def row_errors(x: torch.Tensor, rounded: GridWeight, weight: torch.Tensor) -> torch.Tensor:
    return (x @ (rounded.dequantize().double() - weight).t()).square().mean(dim=0)


@pytest.mark.parametrize("columns", [128, 50])
@pytest.mark.parametrize("shifts", [False, True])
def test_outputs_err_less_and_no_row_errs_more(columns: int, shifts: bool) -> None:
    weight, x = torch.randn(300, columns), correlated_inputs(500, columns)
    start = round_to_nearest(weight)
    tuned = tune_scales(weight, start, x.t() @ x / 500, 16, shifts=shifts)
    before, after = row_errors(x, start, weight), row_errors(x, tuned, weight)
    # Errors are compared in float32 there.
    assert torch.all(after <= before * (1 + 1e-5))
    assert float(after.sum()) < 0.8 * float(before.sum())
    assert tuned.minimum is not None
    assert (tuned.codes.dtype, tuned.scale.dtype, tuned.minimum.dtype) == (
        torch.uint8,
        torch.half,
        torch.half,
    )
    assert tuned.codes.max() <= 15


def test_the_result_is_the_same_again() -> None:
    weight, x = torch.randn(8, 64), correlated_inputs(300, 64)
    start, moment = round_to_nearest(weight), x.t() @ x
    first, second = (tune_scales(weight, start, moment, 16, steps=20) for _ in range(2))
    assert torch.equal(first.dequantize(), second.dequantize())


def test_kept_codes_reach_the_least_squares_solution() -> None:
    weight, x = torch.randn(6, 64), correlated_inputs(300, 64)
    start = round_to_nearest(weight)
    tuned = tune_scales(weight, start, x.t() @ x / 300, 16, steps=1000, keeps_codes=True)
    assert torch.equal(tuned.codes, start.codes)
    for row in range(6):
        # The outputs are linear in the row's two scales and two minimums.
        groups = zip(x.split(GROUP_SIZE, dim=1), start.codes[row].double().split(GROUP_SIZE), strict=True)
        design = torch.stack([part for x, codes in groups for part in (x @ codes, x.sum(dim=1))], dim=1)
        outputs = x @ weight[row].double()
        solution = torch.linalg.lstsq(design, outputs[:, None]).solution[:, 0]
        least = (design @ solution - outputs).square().mean()
        # Scales and minimums are stored in fp16.
        assert row_errors(x, tuned, weight)[row] <= least * 1.05


def test_a_start_better_than_any_rounding_is_kept() -> None:
    weight, x = torch.randn(8, 64), correlated_inputs(300, 64)
    start = round_to_nearest(weight)
    weight = start.dequantize()
    tuned = tune_scales(weight, start, x.t() @ x, 16)
    assert torch.equal(tuned.dequantize(), weight)


def test_constant_groups_stay_finite() -> None:
    weight = torch.randn(4, 64)
    weight[:, :32] = 0.3
    x = correlated_inputs(300, 64)
    start = round_to_nearest(weight)
    tuned = tune_scales(weight, start, x.t() @ x / 300, 16)
    assert tuned.dequantize().isfinite().all()
    assert torch.all(row_errors(x, tuned, weight) <= row_errors(x, start, weight) * (1 + 1e-5))


def test_a_grid_without_minimums_is_refused() -> None:
    start = GridWeight(torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1).half(), None, 32)
    with pytest.raises(ValueError, match="no minimums"):
        tune_scales(torch.zeros(2, 32), start, torch.eye(32), 16)
