"""GPTQ: the codes of the formula computed directly, less output error than rounding, and awkward Hessians."""

from __future__ import annotations

import pytest
import torch

from engine.compression.gptq import InputStatistics, gptq, output_errors
from engine.quant.weight import GridWeight

LEVELS = 16


def spanning_grid(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid from each row's minimum to its maximum, in fp16."""
    minimum = values.amin(dim=1).half()
    return ((values.amax(dim=1) - minimum) / (LEVELS - 1)).half(), minimum


def nearest(values: torch.Tensor, weight: GridWeight) -> torch.Tensor:
    """Codes [N, K] by trying all of each weight's sixteen levels."""
    group = torch.arange(values.shape[1]) // weight.group_size
    assert weight.minimum is not None
    levels = torch.arange(LEVELS)[:, None, None] * weight.scale.double()[:, group] + weight.minimum[:, group]
    return (levels - values).abs().argmin(dim=0)


def round_to_nearest(values: torch.Tensor, group_size: int) -> GridWeight:
    grids = [spanning_grid(group) for group in values.split(group_size, dim=1)]
    scale, minimum = (torch.stack(part, dim=1) for part in zip(*grids, strict=True))
    empty = GridWeight(torch.empty_like(values), scale, minimum, group_size)
    return GridWeight(nearest(values, empty).to(torch.uint8), scale, minimum, group_size)


def optimal_brain_quantization(
    values: torch.Tensor, hessian: torch.Tensor, group_size: int, order: list[int], static_grids: bool
) -> GridWeight:
    """One column after the other, with the inverse of the remaining columns' Hessian taken anew for each.

    Of the remaining columns F, with G = (H_FF)⁻¹, rounding the first one by an error r moves all of F by
    -r / G[0, 0] · G[0, :] (Frantar et al. 2022, equation 2).
    """
    values = values.clone()
    grid = round_to_nearest(values, group_size)
    assert grid.minimum is not None
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    for position, column in enumerate(order):
        group = column // group_size
        if not static_grids and column % group_size == 0:
            columns = slice(column, column + group_size)
            grid.scale[:, group], grid.minimum[:, group] = spanning_grid(values[:, columns])
        codes[:, column] = nearest(values, grid)[:, column]
        rounded = codes[:, column] * grid.scale[:, group].double() + grid.minimum[:, group]
        rest = order[position:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        values[:, rest] -= torch.outer((values[:, column] - rounded) / inverse[0, 0], inverse[0])
    return GridWeight(codes, grid.scale, grid.minimum, group_size)


def correlated_inputs(tokens: int, columns: int) -> torch.Tensor:
    """Inputs whose channels hang together and differ in size, [T, K] float64."""
    mixed = torch.randn(tokens, columns // 4 + 1).double() @ torch.randn(columns // 4 + 1, columns).double()
    return (mixed + 0.3 * torch.randn(tokens, columns)) * torch.rand(columns).double().exp()


def second_moment(x: torch.Tensor) -> torch.Tensor:
    return x.t() @ x / len(x)


def damped(hessian: torch.Tensor, share: float) -> torch.Tensor:
    return hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def assert_same_grid(actual: GridWeight, expected: GridWeight) -> None:
    assert actual.group_size == expected.group_size
    assert actual.minimum is not None
    assert expected.minimum is not None
    assert torch.equal(actual.scale, expected.scale)
    assert torch.equal(actual.minimum, expected.minimum)
    assert torch.equal(actual.codes, expected.codes)


# Groups within a block of 128 columns, over its border, larger than it and no divisor of the width; one for a row.
SHAPES = [(6, 40, 8), (5, 50, 16), (4, 160, 32), (3, 170, 48), (3, 300, 192), (4, 33, 33), (3, 140, 140)]


@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
@pytest.mark.parametrize("by_activation", [False, True])
def test_codes_are_those_of_the_formula(
    rows: int, columns: int, group_size: int, by_activation: bool
) -> None:
    weight = torch.randn(rows, columns).double()
    hessian = second_moment(correlated_inputs(2 * columns, columns))
    order = torch.arange(columns)
    if by_activation:
        order = hessian.diagonal().argsort(descending=True)
    expected = optimal_brain_quantization(
        weight, damped(hessian, 0.01), group_size, order.tolist(), static_grids=by_activation
    )
    actual = gptq(weight, hessian, spanning_grid, group_size, LEVELS, by_activation=by_activation)
    assert_same_grid(actual, expected)
    assert actual.codes.dtype == torch.uint8
    assert actual.codes.is_contiguous()


@pytest.mark.parametrize("by_activation", [False, True])
def test_correlated_inputs_err_less_than_with_rounding(by_activation: bool) -> None:
    weight = torch.randn(64, 192)
    x = correlated_inputs(1000, 192)
    result = gptq(weight, second_moment(x), spanning_grid, 32, LEVELS, by_activation=by_activation)

    def squared_error(rounded: GridWeight) -> float:
        return float((x @ (rounded.dequantize() - weight).double().t()).square().sum())

    assert squared_error(result) < 0.5 * squared_error(round_to_nearest(weight, 32))


def test_independent_inputs_leave_nothing_to_make_up() -> None:
    weight = torch.randn(8, 96)
    result = gptq(weight, torch.rand(96).add(0.1).diag(), spanning_grid, 32, LEVELS)
    assert_same_grid(result, round_to_nearest(weight, 32))


def test_the_factor_of_the_hessian_does_not_matter() -> None:
    weight, hessian = torch.randn(8, 96), second_moment(correlated_inputs(300, 96))
    result = gptq(weight, hessian, spanning_grid, 32, LEVELS)
    assert_same_grid(gptq(weight, 1024 * hessian, spanning_grid, 32, LEVELS), result)


@pytest.mark.parametrize("by_activation", [False, True])
def test_columns_without_input_count_as_zeros(by_activation: bool) -> None:
    weight = torch.randn(8, 64).double()
    weight[:, 5] = 1000  # would spoil the group's grid
    x = correlated_inputs(300, 64)
    x[:, [5, 40]] = 0
    hessian = second_moment(x)
    result = gptq(weight, hessian, spanning_grid, 32, LEVELS, by_activation=by_activation)
    assert result.minimum is not None
    zero = result.dequantize()[:, [5, 40]].abs()
    assert torch.all(zero <= result.scale.float() * 0.5001)
    # The other columns are as though those two were not there, on grids that reach to zero.
    order = hessian.diagonal().argsort(descending=True)[:-2] if by_activation else torch.arange(64)
    live = [column for column in order.tolist() if column not in (5, 40)]
    share = 0.01 * hessian.diagonal().sum() / 62 * torch.eye(64).double()
    weight[:, [5, 40]] = 0
    expected = optimal_brain_quantization(weight, hessian + share, 32, live, static_grids=by_activation)
    assert torch.equal(result.scale, expected.scale)
    assert torch.equal(result.codes[:, live], expected.codes[:, live])


def test_more_damping_where_the_hessian_is_singular() -> None:
    weight = torch.randn(8, 64)
    x = torch.ones(1, 64)
    result = gptq(weight, x.t() @ x, spanning_grid, 32, LEVELS, damping=0.0)
    # Each column takes up the errors before it: what is left is about the last one's half step.
    error = (result.dequantize() - weight).sum(dim=1).abs()
    assert torch.all(error <= result.scale.float().amax(dim=1))


def test_hessians_that_no_damping_helps() -> None:
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match="not positive definite with a damping of 1"):
        gptq(weight, torch.eye(8) - 4 * torch.ones(8, 8), spanning_grid, 8, LEVELS)
    with pytest.raises(ValueError, match="not finite"):
        gptq(weight, torch.full((8, 8), torch.nan), spanning_grid, 8, LEVELS)


def test_a_constant_group_is_kept() -> None:
    weight = torch.full((4, 64), 0.25)
    result = gptq(weight, second_moment(correlated_inputs(300, 64)), spanning_grid, 32, LEVELS)
    assert torch.equal(result.dequantize(), weight)


def test_the_weight_and_the_hessian_are_left_alone() -> None:
    weight, hessian = torch.randn(4, 32), second_moment(correlated_inputs(100, 32))
    hessian[3], hessian[:, 3] = 0, 0
    copies = weight.clone(), hessian.clone()
    gptq(weight, hessian, spanning_grid, 32, LEVELS)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_statistics_of_chunks_are_those_of_the_whole(dtype: torch.dtype) -> None:
    x = torch.randn(100, 12).to(dtype)
    statistics = InputStatistics.empty(12)
    for chunk in x.split([1, 60, 39]):
        statistics.update(chunk)
    exact = x.double()
    assert statistics.num_tokens == 100
    # Sums of 60 float32 products, each rounded to 2**-24.
    torch.testing.assert_close(
        statistics.second_moment,
        exact.t().cov(correction=0) + torch.outer(exact.mean(dim=0), exact.mean(dim=0)),
        rtol=0,
        atol=60 * 2**-24,
    )
    torch.testing.assert_close(statistics.mean_magnitude, exact.abs().mean(dim=0), rtol=1e-6, atol=0)
    assert torch.equal(statistics.peaks, exact.abs().amax(dim=0))


def test_statistics_of_nothing() -> None:
    with pytest.raises(ValueError, match="no token"):
        _ = InputStatistics.empty(4).second_moment


def test_output_errors_are_mean_squares_at_the_outputs() -> None:
    x, difference = correlated_inputs(50, 16), torch.randn(5, 16).double()
    expected = (x @ difference.t()).square().mean(dim=0)
    torch.testing.assert_close(output_errors(difference, second_moment(x)), expected)
