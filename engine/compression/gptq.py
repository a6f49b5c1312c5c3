"""GPTQ: rounds a weight column by column, and the columns not yet rounded make up for each one's error.

With H the second moment of a layer's inputs, a weight row's error e costs e H eᵀ at the output. Once column i is
fixed to q_i, the columns j > i that minimize this cost are

    w_j ← w_j - (w_i - q_i) U[i, j] / U[i, i]             H⁻¹ = Uᵀ U, U upper triangular

(Frantar et al. 2022, arXiv:2210.17323, algorithm 1; Frantar and Alistarh 2022, arXiv:2208.11580, for the derivation.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from engine.quant.rounding import nearest_codes
from engine.quant.weight import GridWeight

FindGrid = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""The grid of a group of columns: values [N, g] → scale [N] and minimum [N], rounded as they will be stored."""

BLOCK_SIZE = 128
"""Columns whose updates of later columns are applied in one product."""

MAX_DAMPING = 1.0


@dataclass
class InputStatistics:
    """What calibration keeps of a layer's inputs, summed chunk by chunk.

    Attributes:
        products: [K, K] float64, the sum of x xᵀ over the tokens.
        magnitudes: [K] float64, the sum of |x|.
        peaks: [K] float64, the maximum of |x|.
        num_tokens: Tokens seen.
    """

    products: torch.Tensor
    magnitudes: torch.Tensor
    peaks: torch.Tensor
    num_tokens: int = 0

    @classmethod
    def empty(cls, in_features: int) -> InputStatistics:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(zeros(in_features, in_features), zeros(in_features), zeros(in_features))

    def update(self, x: torch.Tensor) -> None:
        """Adds the inputs [T, K] of T tokens, T at least 1.

        A chunk's products are summed in float32 (float64 for float64 inputs), chunks in float64: a few thousand
        tokens a chunk are fast and exact enough.
        """
        x = widen(x)
        self.products += x.t() @ x
        self.magnitudes += x.abs().sum(dim=0)
        self.peaks = torch.maximum(self.peaks, x.abs().amax(dim=0).double())
        self.num_tokens += x.shape[0]

    @property
    def second_moment(self) -> torch.Tensor:
        """The mean of x xᵀ, [K, K] float64."""
        return self.products / self._counted()

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """The mean of |x|, [K] float64."""
        return self.magnitudes / self._counted()

    def _counted(self) -> int:
        if self.num_tokens == 0:
            raise ValueError("calibration: no token has reached the layer; give it at least one text")
        return self.num_tokens


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: FindGrid | GridWeight,
    group_size: int,
    levels: int,
    damping: float = 0.01,
    by_activation: bool = False,
    kept: torch.Tensor | None = None,
) -> GridWeight:
    """Rounds a weight so that the outputs of its calibration inputs change least.

    Args:
        weight: [N, K]; float64 is computed in float64, all else in float32.
        hessian: [K, K], the inputs' second moment times any factor (the paper's is 2 X Xᵀ). Columns whose
            diagonal is zero never saw an input: their weights count as zeros.
        grid: Called once for each group, with its columns as the columns before have changed them; or the weight
            rounded otherwise, whose grids stay ("static groups").
        group_size: Columns that share a grid; the last group may be shorter.
        levels: Codes are 0..levels - 1; at most 16.
        damping: Share of the mean diagonal, of columns with an input, that is added to the diagonal; raised up to
            `MAX_DAMPING` as long as the sum is not positive definite. Zero is for a Hessian of full rank.
        by_activation: Rounds columns by decreasing diagonal, those that matter most first ("act order"). The grids
            are then those of the weight as given, so that groups stay consecutive columns.
        kept: [N, K] bool: where it is false, weights are zero and stay that, and later columns make up for what the
            columns before would have had them be; the grids have zero as a code. None: all may be anything.

    Raises:
        ValueError: The Hessian is not finite, or not positive definite with any damping.
    """
    columns = weight.shape[1]
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    # Rows are columns of the weight here: each step reads and writes consecutive memory.
    values = widen(weight).masked_fill(dead, 0).t().contiguous()
    order = torch.arange(columns)
    grids: list[_Grid] = []
    if isinstance(grid, GridWeight):
        grids = _grids_of(grid, values.dtype)
    elif by_activation:
        grids = [_grid(values[start : start + group_size], grid) for start in range(0, columns, group_size)]
    if by_activation:
        order = diagonal.argsort(descending=True, stable=True)
        values = values[order]
    fixed = None if kept is None else ~kept.t()[order]
    positions = order.tolist()
    updates = _updates(hessian[order][:, order], damping).to(values.dtype)
    codes = torch.empty_like(values)

    for start, stop in _blocks(columns, group_size):
        block = values[start:stop]
        errors = torch.empty_like(block)
        for column in range(start, stop):
            if not isinstance(grid, GridWeight) and not by_activation and column % group_size == 0:
                grids.append(_grid(values[column : column + group_size], grid))
            found = grids[positions[column] // group_size]
            target = values[column] if fixed is None else values[column].masked_fill(fixed[column], 0)
            code = nearest_codes(target, found.scale, found.minimum, levels)
            codes[column] = code
            error = values[column] - (code * found.scale + found.minimum)
            errors[column - start] = error
            values[column + 1 : stop].addr_(updates[column, column + 1 : stop], error, alpha=-1)
        values[stop:].addmm_(updates[start:stop, stop:].t(), errors, alpha=-1)

    return GridWeight(
        codes[order.argsort()].t().to(torch.uint8).contiguous(),
        torch.stack([found.stored_scale for found in grids], dim=1),
        torch.stack([found.stored_minimum for found in grids], dim=1),
        group_size,
    )


def output_errors(difference: torch.Tensor, second_moment: torch.Tensor) -> torch.Tensor:
    """The mean squared error at each output of a weight that is off by `difference` [N, K]: e H eᵀ, [N]."""
    return ((difference @ second_moment.to(difference.dtype)) * difference).sum(dim=1)


def widen(values: torch.Tensor) -> torch.Tensor:
    """The values in the dtype that calibration computes in: float64 as it is, all else as float32."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class _Grid:
    """One group's grid, as stored and in the dtype that is computed in; all [N]."""

    stored_scale: torch.Tensor
    stored_minimum: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor


def _grid(group: torch.Tensor, find_grid: FindGrid) -> _Grid:
    """The grid of a group [g, N]."""
    scale, minimum = find_grid(group.t())
    return _Grid(scale, minimum, scale.to(group.dtype), minimum.to(group.dtype))


def _grids_of(weight: GridWeight, dtype: torch.dtype) -> list[_Grid]:
    """The grids of a weight's groups."""
    assert weight.minimum is not None
    numbers = zip(weight.scale.t(), weight.minimum.t(), strict=True)
    return [_Grid(scale, minimum, scale.to(dtype), minimum.to(dtype)) for scale, minimum in numbers]


def _blocks(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most BLOCK_SIZE columns. A group begins in one that holds it, or at the start of one.

    Either way all earlier columns' updates have reached the whole group when its grid is found.
    """
    span = max(1, BLOCK_SIZE // group_size) * group_size
    for first in range(0, columns, span):
        end = min(first + span, columns)
        for start in range(first, end, BLOCK_SIZE):
            yield start, min(start + BLOCK_SIZE, end)


def inverse_root(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U of H⁻¹ = Uᵀ U, upper triangular, [K, K] float64.

    Args:
        hessian: [K, K] float64; a column of zeros counts as independent of the others.
        damping: As of `gptq`.

    Raises:
        ValueError: The Hessian is not finite, or not positive definite with any damping.
    """
    if not hessian.isfinite().all():
        raise ValueError("the Hessian is not finite; check the calibration inputs for NaN and overflow")
    dead = hessian.diagonal() == 0
    mean = hessian.diagonal().sum() / (~dead).sum().clamp(min=1)
    hessian = hessian + dead.diag()
    identity = torch.eye(len(hessian), dtype=hessian.dtype)
    while True:
        # H = R Rᵀ with R upper triangular gives U = R⁻¹ without an inverse of H. R is H's Cholesky factor seen
        # from the other corner.
        factor, failed = torch.linalg.cholesky_ex((hessian + damping * mean * identity).flip(0, 1))
        if not failed:
            break
        if damping >= MAX_DAMPING:
            raise ValueError(
                f"the Hessian of {len(hessian)} inputs is not positive definite with a damping of "
                f"{damping:g}; pass a second moment of the inputs"
            )
        damping = min(max(10 * damping, 1e-4), MAX_DAMPING)
    return torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)


def _updates(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U[i, j] / U[i, i] of H⁻¹ = Uᵀ U, [K, K] float64."""
    root = inverse_root(hessian, damping)
    return root / root.diagonal()[:, None]
