"""Pruning: sets those weights to zero that matter least to what a layer returns.

    magnitude   the least |w| of the matrix                                     Han et al. 2015, arXiv:1506.02626
    wanda       the least |w[n, k]| · ‖x_k‖ of each row n                       Sun et al. 2023, arXiv:2306.11695
    sparsegpt   the least w[n, k]² / U[k, k]² of each block of columns; the columns right of each one then make up for
                its error, as in GPTQ                     Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1

    w_j ← w_j - w_i U[i, j] / U[i, i]   for j > i, where w_i is set to zero        H⁻¹ = Uᵀ U, U upper triangular

A share is exact in what it is counted over (the matrix, the row, the block of columns), up to one weight. Two of four
are the two least of each four consecutive weights of a row: sparsegpt chooses them when it comes to them.
"""

from __future__ import annotations

import torch

from engine.compression.gptq import BLOCK_SIZE, inverse_root, widen
from engine.compression.steps import Prune


def prune(weight: torch.Tensor, moment: torch.Tensor, step: Prune) -> torch.Tensor:
    """The weight [N, K] with zeros, float64 for float64, else float32.

    Args:
        moment: [K, K], the second moment of its inputs.
        step: What to set to zero; K is a multiple of 4 for two of four.
    """
    share = None if step.is_two_of_four else step.share
    match step.algorithm:
        case "sparsegpt":
            return sparsegpt(weight, moment, share)
        case "wanda":
            chosen = wanda(weight, moment.diagonal(), share)
        case "magnitude":
            chosen = magnitude(weight, share)
    return widen(weight).masked_fill(chosen, 0)


def magnitude(weight: torch.Tensor, share: float | None) -> torch.Tensor:
    """Which weights of [N, K] to set to zero, [N, K] bool.

    Args:
        share: That of the matrix; None: two of four.
    """
    scores = weight.abs()
    return two_of_four(scores) if share is None else least(scores.reshape(1, -1), share).view_as(weight)


def wanda(weight: torch.Tensor, mean_square: torch.Tensor, share: float | None) -> torch.Tensor:
    """Which weights of [N, K] to set to zero, [N, K] bool.

    Args:
        mean_square: [K], of the inputs.
        share: That of each row; None: two of four.
    """
    scores = weight.abs() * mean_square.sqrt().to(weight.dtype)
    return two_of_four(scores) if share is None else least(scores, share)


def sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, share: float | None, damping: float = 0.01
) -> torch.Tensor:
    """The weight [N, K] with zeros, and with the others changed to make up for them.

    Args:
        weight: float64 is computed in float64, all else in float32.
        hessian: [K, K], the inputs' second moment times any factor. Columns that never saw an input become zeros.
        share: That of each block of `BLOCK_SIZE` columns, over all rows; None: two of four.
        damping: As of `engine.compression.gptq.gptq`.

    Raises:
        ValueError: The Hessian is not finite, or not positive definite with any damping.
    """
    columns = weight.shape[1]
    hessian = hessian.double()
    # Rows are columns of the weight here: each step reads and writes consecutive memory.
    values = widen(weight).masked_fill(hessian.diagonal() == 0, 0).t().contiguous()
    root = inverse_root(hessian, damping)
    diagonal = root.diagonal()
    updates = (root / diagonal[:, None]).to(values.dtype)
    importance = diagonal.square().reciprocal().to(values.dtype)[:, None]

    for start in range(0, columns, BLOCK_SIZE):
        stop = min(start + BLOCK_SIZE, columns)
        block = values[start:stop]
        scores = block.square() * importance[start:stop]
        chosen = torch.zeros_like(block, dtype=torch.bool)
        if share is not None:
            chosen = least(scores.view(1, -1), share).view_as(block)
        errors = torch.empty_like(block)
        for column in range(start, stop):
            if share is None and column % 4 == 0:
                four = slice(column - start, column - start + 4)
                scores = block[four].square() * importance[column : column + 4]
                chosen[four] = two_of_four(scores.t()).t()
            error = values[column].masked_fill(~chosen[column - start], 0)
            errors[column - start] = error
            values[column].masked_fill_(chosen[column - start], 0)
            values[column + 1 : stop].addr_(updates[column, column + 1 : stop], error, alpha=-1)
        values[stop:].addmm_(updates[start:stop, stop:].t(), errors, alpha=-1)
    return values.t().contiguous()


def least(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The least share of each row's scores [R, K] → [R, K] bool, of equal ones the first."""
    count = round(share * scores.shape[1])
    order = scores.argsort(dim=1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], True)


def two_of_four(scores: torch.Tensor) -> torch.Tensor:
    """The two least of each four consecutive scores of a row: [R, K] → [R, K] bool, of equal ones the first."""
    return least(scores.reshape(-1, 4), 0.5).view_as(scores)
