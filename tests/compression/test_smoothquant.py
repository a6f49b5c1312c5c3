"""SmoothQuant: folding changes no output, ranges meet in the middle, and int8 errs less."""

from __future__ import annotations

import pytest
import torch

from engine.compression.smoothquant import (
    fold_into_inputs,
    fold_into_norm,
    fold_into_outputs,
    smoothing_scale,
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def outlier_inputs(tokens: int, columns: int) -> torch.Tensor:
    x = torch.randn(tokens, columns).double()
    x[:, ::16] *= 50
    return x


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_a_norm_takes_the_scale_of_the_weights_behind_it(offset: float, alpha: float) -> None:
    x, norm = torch.randn(20, 64).double(), torch.randn(64).double()
    weights = [torch.randn(24, 64).double(), torch.randn(8, 64).double()]
    inputs = rms_norm(x, norm + offset)
    scale = smoothing_scale(inputs.abs().amax(dim=0), weights, alpha)
    smoothed = rms_norm(x, fold_into_norm(norm, scale, offset) + offset)
    torch.testing.assert_close(smoothed * scale, inputs)
    for weight in weights:
        torch.testing.assert_close(smoothed @ fold_into_inputs(weight, scale).t(), inputs @ weight.t())


@pytest.mark.parametrize("has_bias", [False, True])
def test_an_up_projection_takes_the_scale_of_down(has_bias: bool) -> None:
    x, gate = torch.randn(20, 16).double(), torch.randn(48, 16).double()
    up, down = torch.randn(48, 16).double(), torch.randn(16, 48).double()
    bias = torch.randn(48).double() if has_bias else None

    def mlp(up: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x @ gate.t()) * torch.nn.functional.linear(x, up, bias) @ down.t()

    scale = smoothing_scale(torch.rand(48) * 10, [down])
    smoothed = mlp(*fold_into_outputs(up, bias, scale), fold_into_inputs(down, scale))
    torch.testing.assert_close(smoothed, mlp(up, bias, down))


def test_ranges_meet_in_the_middle() -> None:
    x, weight = outlier_inputs(100, 64), torch.randn(24, 64).double()
    scale = smoothing_scale(x.abs().amax(dim=0), [weight], 0.5)
    torch.testing.assert_close((x / scale).abs().amax(dim=0), (weight * scale).abs().amax(dim=0))


def test_alpha_one_evens_out_the_activations() -> None:
    x, weight = outlier_inputs(100, 64), torch.randn(24, 64).double()
    smoothed = x / smoothing_scale(x.abs().amax(dim=0), [weight], 1.0)
    torch.testing.assert_close(smoothed.abs().amax(dim=0), torch.ones(64).double())


def test_int8_products_of_outliers_err_less() -> None:
    x, weight = outlier_inputs(100, 64), torch.randn(24, 64).double()

    def round_rows(values: torch.Tensor) -> torch.Tensor:
        step = values.abs().amax(dim=1, keepdim=True) / 127
        return (values / step).round() * step

    def error(x: torch.Tensor, weight: torch.Tensor) -> float:
        return float((round_rows(x) @ round_rows(weight).t() - x @ weight.t()).square().mean())

    scale = smoothing_scale(x.abs().amax(dim=0), [weight])
    assert error(x / scale, fold_into_inputs(weight, scale)) < 0.5 * error(x, weight)


def test_channels_of_zeros_keep_their_scale() -> None:
    weight = torch.tensor([[1.0, 4.0, 0.0]])
    scale = smoothing_scale(torch.tensor([0.0, 1.0, 3.0]), [weight])
    assert scale.tolist() == [1, 0.5, 1]


def test_peaks_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        smoothing_scale(torch.tensor([torch.inf]), [torch.ones(1, 1)])
