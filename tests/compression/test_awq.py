"""AWQ: errors as measured on inputs, gains on outlier channels, and clipping that never costs a group."""

from __future__ import annotations

import pytest
import torch

from engine.compression.awq import activation_scale, round_clipped, search_scale
from engine.quant.weight import GridWeight

GROUP_SIZE = 32


def spanning_grid(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    minimum = values.amin(dim=1).half()
    return ((values.amax(dim=1) - minimum) / 15).half(), minimum


def round_to_nearest(values: torch.Tensor) -> GridWeight:
    codes, scales, minimums = [], [], []
    for group in values.split(GROUP_SIZE, dim=1):
        scale, minimum = spanning_grid(group)
        codes.append(
            ((group - minimum[:, None]) / scale[:, None].float()).round().clamp(0, 15).to(torch.uint8)
        )
        scales.append(scale)
        minimums.append(minimum)
    return GridWeight(torch.cat(codes, 1), torch.stack(scales, 1), torch.stack(minimums, 1), GROUP_SIZE)


def outlier_inputs(tokens: int, columns: int) -> torch.Tensor:
    """Inputs of which every sixteenth channel is thirty times as large, [T, K]."""
    x = torch.randn(tokens, columns)
    x[:, ::16] *= 30
    return x


def second_moment(x: torch.Tensor) -> torch.Tensor:
    return x.t() @ x / len(x)


def squared_error(x: torch.Tensor, rounded: torch.Tensor, weight: torch.Tensor) -> float:
    """Summed over the outputs, the mean over the tokens."""
    return float((x.double() @ (rounded - weight).double().t()).square().sum(dim=1).mean())


def test_outlier_channels_err_less_than_with_rounding() -> None:
    x, weight = outlier_inputs(500, 128), torch.randn(64, 128)
    search = search_scale([weight], x.abs().mean(dim=0), second_moment(x), round_to_nearest)
    plain = squared_error(x, round_to_nearest(weight).dequantize(), weight)
    scaled = squared_error(x, round_to_nearest(weight * search.scale).dequantize() / search.scale, weight)
    assert 0 < search.alpha < 1
    assert scaled < 0.5 * plain
    assert search.errors[search.alpha] == min(search.errors.values())
    assert torch.all(search.scale[::16] > search.scale[1])


def test_errors_are_those_measured_on_the_inputs_of_all_weights() -> None:
    x, weights = outlier_inputs(200, 64), [torch.randn(8, 64), torch.randn(24, 64)]
    magnitude = x.abs().mean(dim=0)
    search = search_scale(weights, magnitude, second_moment(x), round_to_nearest, steps=4)
    assert list(search.errors) == [0, 0.25, 0.5, 0.75, 1]
    for alpha, error in search.errors.items():
        # Written out: the normalization multiplies all channels alike.
        powers = (magnitude / magnitude.mean()) ** alpha
        scale = powers / (powers.max() * powers.min()).sqrt()
        expected = sum(squared_error(x, round_to_nearest(w * scale).dequantize() / scale, w) for w in weights)
        # The scale in float32 here and in float64 there can move a few weights to the other neighbour.
        assert error == pytest.approx(expected, rel=1e-3)


def test_alpha_zero_is_rounding() -> None:
    x, weight = outlier_inputs(200, 64), torch.randn(16, 64)
    search = search_scale([weight], x.abs().mean(dim=0), second_moment(x), round_to_nearest)
    plain = squared_error(x, round_to_nearest(weight).dequantize(), weight)
    assert search.errors[0] == pytest.approx(plain, rel=1e-4)
    assert torch.equal(activation_scale(x.abs().mean(dim=0), 0), torch.ones(64).double())


def test_even_inputs_keep_the_scale_even() -> None:
    search = search_scale([torch.randn(8, 64)], torch.full((64,), 3.0), torch.eye(64), round_to_nearest)
    assert search.alpha == 0
    assert torch.equal(search.scale, torch.ones(64).double())


def test_scales_of_channels_without_input_stay_finite() -> None:
    scale = activation_scale(torch.tensor([0.0, 1.0, 2.0]), 0.5)
    assert torch.all(scale > 0)
    assert scale.isfinite().all()
    assert float(scale.amax() * scale.amin()) == pytest.approx(1)
    assert torch.equal(activation_scale(torch.zeros(3), 0.5), torch.ones(3).double())
    with pytest.raises(ValueError, match="not finite"):
        activation_scale(torch.tensor([1.0, torch.nan]), 0.5)


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    """Weights of which a few are far out, [N, K]."""
    return torch.randn(rows, columns) * torch.randn(rows, columns).abs().exp()


def test_clipping_takes_each_groups_best_factor() -> None:
    weight, moment = heavy_tailed(6, 50), second_moment(torch.randn(300, 50))
    result = round_clipped(weight, moment, spanning_grid, GROUP_SIZE, 16, steps=5, least=0.5)
    for start in (0, GROUP_SIZE):
        columns = slice(start, min(start + GROUP_SIZE, 50))
        for row in range(6):
            group = weight[row, columns].double()
            costs = []
            for factor in (1, 0.9, 0.8, 0.7, 0.6, 0.5):
                clipped = group.float().clamp(group.min() * factor, group.max() * factor)
                scale, minimum = (float(x) for x in spanning_grid(clipped[None]))
                levels = torch.arange(16).double() * scale + minimum
                error = levels[(levels[:, None] - group).abs().argmin(dim=0)] - group
                costs.append(float(error @ moment[columns, columns].double() @ error))
            error = result.dequantize()[row, columns].double() - group
            cost = float(error @ moment[columns, columns].double() @ error)
            # Costs are compared in float32 there.
            assert cost == pytest.approx(min(costs), rel=1e-4)


def test_clipping_heavy_tails_errs_less_than_rounding() -> None:
    weight, x = heavy_tailed(32, 128), outlier_inputs(500, 128)
    clipped = round_clipped(weight, second_moment(x), spanning_grid, GROUP_SIZE, 16).dequantize()
    assert squared_error(x, clipped, weight) < 0.9 * squared_error(
        x, round_to_nearest(weight).dequantize(), weight
    )


def test_clipping_an_exact_group_leaves_it() -> None:
    weight = torch.randint(0, 16, (4, 64)) * 0.25 - 1
    weight[:, ::32], weight[:, 1::32] = -1, 2.75
    result = round_clipped(weight, second_moment(torch.randn(300, 64)), spanning_grid, GROUP_SIZE, 16)
    assert torch.equal(result.dequantize(), weight)
