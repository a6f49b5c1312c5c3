"""Scale tuning: moves the grids of a rounded weight to where its outputs err least, by gradient descent.

    minimize  Σ_n e_n H e_nᵀ        e = s · code + m - w,   code = clamp(round((w - m) / s), 0, levels - 1)

H is the second moment of the layer's inputs. Rounding has no gradient of use; it is taken as the identity where
nothing is clipped (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432), which gives a scale's
gradient as in LSQ (Esser et al. 2019, arXiv:1902.08153, equation 3). Codes that GPTQ chose are better than nearest
ones and are kept; what is minimized is then a quadratic, and the gradient exact.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from engine.compression.gptq import output_errors, widen
from engine.quant.rounding import nearest_codes
from engine.quant.weight import GridWeight

CHUNK_SIZE = 256
"""Rows tuned together: they do not depend on each other, and this many of them stay in a core's cache."""


def tune_scales(
    weight: torch.Tensor,
    start: GridWeight,
    second_moment: torch.Tensor,
    levels: int,
    steps: int = 100,
    learning_rate: float = 2e-2,
    shifts: bool = True,
    keeps_codes: bool = False,
) -> GridWeight:
    """The best grid of each row seen on the way; no row's error is above the start's.

    Each step rounds the weight to the grid as it would be stored.

    Args:
        weight: [N, K], what the start was rounded from.
        start: Codes 0..levels - 1 with scales and minimums.
        second_moment: [K, K] of the inputs.
        steps: Steps of Adam, whose rate falls linearly to zero.
        learning_rate: Share of the scale that a first step changes it by.
        shifts: Moves the grids too; without it they are only stretched, around zero.
        keeps_codes: Leaves the start's codes as they are instead of rounding again.

    Raises:
        ValueError: The start has no minimums.
    """
    if start.minimum is None:
        raise ValueError("scale tuning: the grid has no minimums; round to a grid that has")
    values = widen(weight)
    moment = second_moment.to(values.dtype)
    tuned = []
    for first in range(0, len(values), CHUNK_SIZE):
        rows = torch.arange(first, min(first + CHUNK_SIZE, len(values)))
        tuned.append(
            _tune_rows(
                values[rows], start.rows(rows), moment, levels, steps, learning_rate, shifts, keeps_codes
            )
        )
    return GridWeight(
        torch.cat([part.codes for part in tuned]),
        torch.cat([part.scale for part in tuned]),
        torch.cat([part.minimum for part in tuned if part.minimum is not None]),
        start.group_size,
    )


def _tune_rows(
    weight: torch.Tensor,
    start: GridWeight,
    second_moment: torch.Tensor,
    levels: int,
    steps: int,
    learning_rate: float,
    shifts: bool,
    keeps_codes: bool,
) -> GridWeight:
    assert start.minimum is not None
    rows, columns = weight.shape
    dtype, num_groups = weight.dtype, start.scale.shape[1]
    # Columns that fill the last group have no input: they cost nothing and move nothing.
    padding = num_groups * start.group_size - columns
    target = pad(weight, (0, padding)).view(rows, num_groups, start.group_size)
    kept = pad(start.codes, (0, padding)).view(target.shape).to(dtype)
    moment = pad(second_moment, (0, padding, 0, padding))

    start_scale, start_minimum = start.scale.to(dtype), start.minimum.to(dtype)
    scale, minimum = start.scale, start.minimum
    start_errors = errors = output_errors(start.dequantize().to(dtype) - weight, second_moment)
    # The scale is start · exp(stretch), the minimum is stretched with it and shifted by `shift` start scales.
    stretch, shift = torch.zeros_like(start_scale), torch.zeros_like(start_scale)
    optimizer = torch.optim.Adam([stretch, shift] if shifts else [stretch])
    for step in range(steps + 1):
        new_scale = (start_scale * stretch.exp()).to(start.scale.dtype)
        new_minimum = (start_minimum * stretch.exp() + shift * start_scale).to(start.minimum.dtype)
        step_size, offset = new_scale.to(dtype)[:, :, None], new_minimum.to(dtype)[:, :, None]
        codes = kept if keeps_codes else nearest_codes(target, step_size, offset, levels)
        difference = codes * step_size + offset - target
        slope = (difference.flatten(1) @ moment).view(target.shape)
        new_errors = (slope * difference).sum(dim=(1, 2))

        better = new_errors < errors
        errors = torch.minimum(new_errors, errors)
        scale = torch.where(better[:, None], new_scale, scale)
        minimum = torch.where(better[:, None], new_minimum, minimum)

        if keeps_codes:
            by_scale, by_minimum = (slope * codes).sum(dim=2), slope.sum(dim=2)
        else:
            position = (target - offset) / torch.where(step_size > 0, step_size, 1.0)
            clipped = (position < 0) | (position > levels - 1)
            by_scale = (slope * (codes - torch.where(clipped, 0.0, position))).sum(dim=2)
            by_minimum = (slope * clipped).sum(dim=2)
        stretch.grad = (by_scale * start_scale + by_minimum * start_minimum) * stretch.exp()
        shift.grad = by_minimum * start_scale
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / (steps + 1))
        optimizer.step()

    if keeps_codes:
        return GridWeight(start.codes, scale, minimum, start.group_size)
    codes = nearest_codes(target, scale.to(dtype)[:, :, None], minimum.to(dtype)[:, :, None], levels)
    codes = codes.flatten(1)[:, :columns].to(start.codes.dtype)
    codes = torch.where((errors < start_errors)[:, None], codes, start.codes)
    return GridWeight(codes, scale, minimum, start.group_size)
