"""AWQ: input channels with large activations are scaled up before rounding, so that they get finer steps.

    W x ≈ (Q(W · diag(s)) · diag(s)⁻¹) x              s_k = mean|x_k| ** alpha

The scale goes into what feeds the weight (`engine.compression.smoothquant` folds it), W · diag(s) is what is stored.
Alpha is searched for the least error at the output (Lin et al. 2023, arXiv:2306.00978, equations 4 and 5); so is how
far each group's range is clipped (section 3.2's remark, and the authors' implementation notes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.compression.gptq import FindGrid, output_errors, widen
from engine.quant.rounding import nearest_codes
from engine.quant.weight import GridWeight

RoundWeight = Callable[[torch.Tensor], GridWeight]
"""Rounds a weight [N, K] to the grid it is to be stored on."""

QUIETEST = 1e-4
"""Least magnitude of a channel, of the mean: a channel without input must not be scaled to nothing."""


@dataclass(frozen=True)
class ScaleSearch:
    """The scale found, and what each alpha tried would cost.

    Attributes:
        scale: [K] float64; all ones for alpha 0.
        alpha: Of the scale.
        errors: Mean squared output error summed over outputs and weights, by alpha.
    """

    scale: torch.Tensor
    alpha: float
    errors: dict[float, float]


def search_scale(
    weights: Sequence[torch.Tensor],
    mean_magnitude: torch.Tensor,
    second_moment: torch.Tensor,
    round_weight: RoundWeight,
    steps: int = 20,
) -> ScaleSearch:
    """One scale for weights that share their input (queries, keys and values; gate and up).

    Args:
        weights: Each [N, K].
        mean_magnitude: [K], the mean of |x| over the calibration tokens.
        second_moment: [K, K], the mean of x xᵀ.
        round_weight: Called with each W · diag(s).
        steps: Alphas tried besides 0, evenly up to 1; the least wins among equals.
    """
    wide = [widen(weight) for weight in weights]
    errors, scales = {}, {}
    for step in range(steps + 1):
        alpha = step / steps
        scales[alpha] = activation_scale(mean_magnitude, alpha)
        scale = scales[alpha].to(wide[0].dtype)
        errors[alpha] = sum(
            float(
                output_errors(
                    round_weight(weight * scale).dequantize().to(weight.dtype) / scale - weight, second_moment
                ).sum()
            )
            for weight in wide
        )
    best = min(errors, key=errors.__getitem__)
    return ScaleSearch(scales[best], best, errors)


def activation_scale(mean_magnitude: torch.Tensor, alpha: float) -> torch.Tensor:
    """mean|x| ** alpha, [K] float64, normalized so that the largest times the least is 1.

    Raises:
        ValueError: A magnitude is not finite.
    """
    if not mean_magnitude.isfinite().all():
        raise ValueError("awq: the inputs' magnitudes are not finite; check the calibration inputs for NaN")
    magnitude = mean_magnitude.double()
    mean = magnitude.mean()
    if mean == 0:
        return torch.ones_like(magnitude)
    scale = (magnitude / mean).clamp(min=QUIETEST) ** alpha
    return scale / (scale.amax() * scale.amin()).sqrt()


def round_clipped(
    weight: torch.Tensor,
    second_moment: torch.Tensor,
    find_grid: FindGrid,
    group_size: int,
    levels: int,
    steps: int = 10,
    least: float = 0.5,
) -> GridWeight:
    """Rounds each group of each row with the shrunken range that costs least at the output.

    A group is judged by itself, e_g H_gg e_gᵀ, as though the others were exact.

    Args:
        weight: [N, K].
        second_moment: [K, K] of the inputs that the weight is multiplied with: for W · diag(s) that is
            H / (s sᵀ).
        find_grid: values [N, g] → scale [N] and minimum [N] as they will be stored.
        levels: Codes are 0..levels - 1; at most 16.
        steps: Factors tried besides 1, evenly down to `least`.
    """
    values = widen(weight)
    codes, scales, minimums = [], [], []
    for start in range(0, values.shape[1], group_size):
        group = slice(start, start + group_size)
        found = _round_group(values[:, group], second_moment[group, group], find_grid, levels, steps, least)
        codes.append(found[0].to(torch.uint8))
        scales.append(found[1])
        minimums.append(found[2])
    return GridWeight(
        torch.cat(codes, dim=1), torch.stack(scales, dim=1), torch.stack(minimums, dim=1), group_size
    )


def _round_group(
    values: torch.Tensor,
    second_moment: torch.Tensor,
    find_grid: FindGrid,
    levels: int,
    steps: int,
    least: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, g], scale [N] and minimum [N] of one group [N, g]."""
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    best = None
    for step in range(steps + 1):
        factor = 1 - (1 - least) * step / steps
        scale, minimum = find_grid(values.clamp(low * factor, high * factor))
        step_size, offset = (x.to(values.dtype)[:, None] for x in (scale, minimum))
        codes = nearest_codes(values, step_size, offset, levels)
        error = output_errors(codes * step_size + offset - values, second_moment)
        if best is None:
            best = (error, codes, scale, minimum)
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better[:, None], codes, best[1]),
                torch.where(better, scale, best[2]),
                torch.where(better, minimum, best[3]),
            )
    assert best is not None
    return best[1:]
