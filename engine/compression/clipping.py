"""Clipping: ranges narrower than a group's minimum and maximum, so that few large values do not coarsen the grid.

    none         low = min(w), high = max(w)                        `engine.quant.rounding.full_ranges`
    percentile   the range without the outermost (100 - percentile) / 2 % on either side
    mse          the shrunk range [f * min(w), f * max(w)] with the least  sum_k importance[k] * (w[k] - Q(w[k]))²
    kl           the range [-t, t] with the least  sum_i P[i] * log(P[i] / Q[i]),  P the histogram of |w| with what
                 lies beyond t added to its last bin, Q the same histogram with as few levels as there are codes

Sources: the percentile and the Kullback-Leibler divergence as in Wu et al. 2020, "Integer quantization for deep
learning inference", section 3.3 (arXiv:2004.09602), the latter from Migacz 2017, "8-bit inference with TensorRT" (GTC
S7310); the mean squared error as in Nagel et al. 2021, "A white paper on neural network quantization", section 3.1
(arXiv:2106.08295).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.quant.rounding import (
    Ranges,
    fit_grid,
    full_ranges,
    grid_values,
    group_pieces,
    require_finite,
    require_importance,
    round_to_grid,
)

# A search holds a few copies of so many values.
_CHUNK = 1 << 22


def percentile_ranges(weight: torch.Tensor, group_size: int | None, percentile: float = 99.9) -> Ranges:
    """The range that holds `percentile` per cent of each group's values, as many beyond one end as the other.

    Between two values the ends are interpolated linearly, as numpy does.

    Args:
        weight: [N, K] float.
        group_size: Columns that share a range, the last group may be shorter; None is the whole row.
        percentile: Above 0, up to 100.

    Raises:
        ValueError: A percentile out of bounds, or as `full_ranges`.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile {percentile}: must be above 0 and at most 100")

    def find(values: torch.Tensor) -> Ranges:
        ordered = values.sort(dim=2).values
        position = (1 - percentile / 100) / 2 * (ordered.shape[2] - 1)
        before = int(position)
        after = min(before + 1, ordered.shape[2] - 1)
        low = torch.lerp(ordered[:, :, before], ordered[:, :, after], position - before)
        high = torch.lerp(ordered[:, :, -1 - before], ordered[:, :, -1 - after], position - before)
        # The two interpolations may round past each other where they meet.
        return Ranges(low, torch.maximum(low, high))

    return _find_ranges(find, weight, group_size)


def mse_ranges(
    weight: torch.Tensor,
    group_size: int | None,
    bits: int,
    symmetric: bool,
    importance: torch.Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
    smallest: float = 0.2,
    steps: int = 40,
) -> Ranges:
    """The shrunk range of each group whose stored grid has the least squared rounding error.

    The factors are `steps` + 1 from 1 down to `smallest`, at even distances. The full range is one of them, so that
    the error is never above that without clipping.

    Args:
        weight: [N, K] float.
        group_size: Columns that share a range, the last group may be shorter; None is the whole row.
        bits: Of the grid, as `symmetric` and `scale_dtype`: see `fit_grid`.
        importance: [K], at least 0: the factor of each column's squared error (the mean square of the activation it
            meets, for the error of the product); None weighs all alike.

    Raises:
        ValueError: An importance or factors out of bounds, or as `full_ranges` and `fit_grid`.
    """
    if not 0 < smallest <= 1 or steps < 1:
        raise ValueError(
            f"{steps} factors down to {smallest}: must be at least 1, down to above 0 and at most 1"
        )
    # Also names the group whose range no grid can hold; narrower ranges fit where this one does.
    fit_grid(full_ranges(weight, group_size), bits, symmetric, scale_dtype)
    columns = weight.shape[1]
    if importance is None:
        importance = torch.ones(columns, device=weight.device)
    require_importance(importance, columns)

    def find(values: torch.Tensor, importance: torch.Tensor) -> Ranges:
        low, high = values.amin(dim=2, keepdim=True), values.amax(dim=2, keepdim=True)
        best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
        for step in range(steps + 1):
            factor = 1 - (1 - smallest) * step / steps
            grid = fit_grid(Ranges(low * factor, high * factor), bits, symmetric, scale_dtype)
            rounded = grid_values(round_to_grid(values, grid), grid)
            error = rounded.sub_(values).square_().mul_(importance).sum(dim=2, keepdim=True)
            best = torch.where(error < least, factor, best)
            least = torch.minimum(error, least)
        return Ranges((low * best)[:, :, 0], (high * best)[:, :, 0])

    return _find_ranges(find, weight, group_size, importance.float())


def kl_ranges(weight: torch.Tensor, group_size: int | None, bits: int, bins: int = 2048) -> Ranges:
    """The range whose quantized histogram diverges least from the histogram of the values' magnitudes.

    TensorRT's entropy calibration. The candidates t are the upper edges of the bins from the 2^(bits - 1)-th on. P is
    the histogram up to t, what lies beyond added to its last bin. Q spreads the same bins, without what lies beyond,
    over 2^(bits - 1) levels: each level's sum in equal parts on those of its bins that are not empty. The returned
    range is [-t, t] cut to the group's minimum and maximum.

    A histogram says little of fewer values than it has bins: such groups keep their minimum and maximum. It is meant
    for whole tensors (`weight.view(1, -1)`) and long rows.

    Args:
        weight: [N, K] float.
        group_size: Columns that share a range, the last group may be shorter; None is the whole row.
        bits: Of the grid the range is for.

    Raises:
        ValueError: Fewer bins than levels, or as `full_ranges`.
    """
    levels = 2 ** (bits - 1)
    if bins < levels:
        raise ValueError(f"{bins} bins for {levels} levels: use at least as many bins")

    def find(values: torch.Tensor) -> Ranges:
        low, high = values.amin(dim=2), values.amax(dim=2)
        if values.shape[2] < bins:
            return Ranges(low, high)
        limit = _least_divergence(values.flatten(0, 1), levels, bins).view_as(low)
        return Ranges(torch.maximum(low, -limit), torch.minimum(high, limit))

    return _find_ranges(find, weight, group_size)


def _least_divergence(values: torch.Tensor, levels: int, bins: int) -> torch.Tensor:
    """The threshold t for each row of values [R, size] → [R] float32.

    With h[j] the count of bin j, T their sum over all bins, I the sum of the first i, O = T - I, and for each level b
    its sum S[b] and its number of bins n[b] that are not empty, the divergence of the first i bins is

        ( sum_j h[j] log h[j] - sum_b S[b] log(S[b] / n[b])
          + (h[i-1] + O) log(h[i-1] + O) - h[i-1] log h[i-1] - O log(S[last] / n[last]) ) / T  -  log(T / I)

    where all sums are differences of prefix sums: a candidate costs as much as it has levels, not bins.
    """
    magnitude = values.abs()
    largest = magnitude.amax(dim=1)
    divisor = torch.where(largest > 0, largest, 1.0)
    index = (magnitude / divisor[:, None] * bins).long().clamp_(max=bins - 1)
    ones = torch.ones((), dtype=torch.float64, device=values.device).expand(index.shape)
    counts = torch.zeros(len(values), bins, dtype=torch.float64, device=values.device).scatter_add_(
        1, index, ones
    )

    sums = _prefix_sums(counts)
    filled = _prefix_sums((counts > 0).double())
    entropies = _prefix_sums(torch.xlogy(counts, counts))
    total = sums[:, -1]
    least = torch.full_like(total, torch.inf)
    best = torch.full_like(total, bins)
    for kept in range(levels, bins + 1):
        edges = torch.arange(levels + 1, device=values.device) * kept // levels
        level_sums = sums[:, edges].diff(dim=1)
        level_means = level_sums / filled[:, edges].diff(dim=1).clamp_(min=1)
        inside, last = sums[:, kept], counts[:, kept - 1]
        beyond = total - inside
        divergence = (
            entropies[:, kept]
            - torch.xlogy(level_sums, level_means).sum(dim=1)
            + torch.xlogy(last + beyond, last + beyond)
            - torch.xlogy(last, last)
            - torch.xlogy(beyond, level_means[:, -1])
        ) / total - torch.log(total / inside)
        # P is not zero in the last bin where values lie beyond it; Q is, if the bin itself is empty.
        divergence = torch.where((last == 0) & (beyond > 0), torch.inf, divergence)
        best = torch.where(divergence < least, kept, best)
        least = torch.minimum(divergence, least)
    return (divisor * (best / bins)).float()


def _prefix_sums(x: torch.Tensor) -> torch.Tensor:
    """[R, n] → [R, n + 1]: element i is the sum of the first i."""
    return torch.nn.functional.pad(x.cumsum(dim=1), (1, 0))


def _find_ranges(
    find: Callable[..., Ranges], weight: torch.Tensor, group_size: int | None, *by_column: torch.Tensor
) -> Ranges:
    """Ranges [N, groups] from a function of some rows' groups.

    Args:
        find: values [n, groups, size] float32, and each of `by_column` [1, groups, size] → ranges [n, groups].
        by_column: Tensors [K] that are cut into groups as the weight's columns are.
    """
    require_finite(weight)
    pieces = group_pieces(weight.float(), group_size)
    cut = [group_pieces(tensor[None], group_size) for tensor in by_column]
    lows, highs = [], []
    for piece, *others in zip(pieces, *cut, strict=True):
        parts = [find(rows, *others) for rows in torch.split(piece, max(1, _CHUNK // piece[0].numel()))]
        lows.append(torch.cat([part.low for part in parts]))
        highs.append(torch.cat([part.high for part in parts]))
    return Ranges(torch.cat(lows, dim=1), torch.cat(highs, dim=1))
