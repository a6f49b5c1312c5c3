"""Low rank: a matrix as the product of two factors, and how large a rank each matrix of a model gets.

    W ≈ B A        W [N, K], B [N, R], A [R, K]: smaller where R < N K / (N + K)

Plain (`svd`) the factors are those of W's truncated singular value decomposition, W ≈ U_R U_Rᵀ W. Whitened
(`svd-llm`) they are those of least error at the output on the calibration's inputs, whose second moment is M = S Sᵀ:

    W S = U Σ Vᵀ      W ≈ U_R Σ_R V_Rᵀ S⁻¹ = U_R U_Rᵀ W      |W x - B A x|² has the mean Σ_{i > R} σ_i²

Any root S gives the same product, Cholesky's or another; and as the right side needs no inverse of it, inputs that
are not independent need no damping. Plain is M = 1.

Matrices that are multiplied as one, like queries, keys and values, are decomposed as one, and share A: of
SmolLM2-135M's layer 2, at 0.8 of the bytes, 0.56 % of the energy of queries, keys and values is lost so, and 0.86 %
with factors of each its own; of gate and up 2.2 and 2.8 %.

Source: Wang et al. 2024, "SVD-LLM", section 3 (arXiv:2403.07378), of whitening.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

_RIDGE = 1e-8
"""A share of the mean of the diagonal, added to it where inner features may be next to dependent."""


def energies(weight: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """The squares of the singular values of W S, descending: [min(N, K)] float64, none below zero.

    Args:
        weight: [N, K].
        moment: [K, K], S Sᵀ; None: S is 1.
    """
    return torch.linalg.eigvalsh(_gram(weight.double(), moment)[0]).flip(0).clamp(min=0)


def decompose(
    weight: torch.Tensor, moment: torch.Tensor | None, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of a weight [N, K] that lose least: B [N, rank] and A [rank, K], float64.

    A column of B has the norm of A's row of the same number, so that float16 holds both.

    Args:
        moment: The second moment [K, K] of the inputs; None: plain.
        rank: At most min(N, K).
    """
    weight = weight.double()
    gram, seen = _gram(weight, moment)
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    if seen is not None:
        # From the right singular vectors to the left ones.
        vectors = torch.nn.functional.normalize(seen @ vectors, dim=0)
    inner = vectors.t() @ weight
    balance = inner.norm(dim=1).sqrt()
    return vectors * balance, inner / torch.where(balance > 0, balance, 1.0)[:, None]


def refit(weight: torch.Tensor, inner: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """The outer factor [N, R] float64 of least error at the output beside an inner one [R, K] that was rounded.

    B = W M Aᵀ (A M Aᵀ)⁻¹.
    """
    weight, inner = weight.double(), inner.double()
    seen = inner if moment is None else inner @ moment.double()
    products = inner @ seen.t()
    products.diagonal().add_(_RIDGE * products.diagonal().mean())
    return torch.linalg.solve(products, seen @ weight.t()).t()


def _gram(weight: torch.Tensor, moment: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W S (W S)ᵀ = W M Wᵀ [N, N]; or, where that is smaller, (W S)ᵀ W S [K, K], and W S."""
    if len(weight) <= weight.shape[1]:
        return (weight if moment is None else weight @ moment.double()) @ weight.t(), None
    seen = weight
    if moment is not None:
        values, vectors = torch.linalg.eigh(moment.double())
        seen = weight @ (vectors * values.clamp(min=0).sqrt())
    return seen.t() @ seen, seen


@dataclass(frozen=True, slots=True)
class Choice:
    """A rank that a matrix may get.

    Attributes:
        rank: 0: it stays as it is.
        num_bytes: Of what is then stored.
        kept: The share of the energy that is kept, 1 where it stays.
    """

    rank: int
    num_bytes: int
    kept: float


def least_rank(choices: Sequence[Choice], energy: float) -> Choice:
    """The first choice that keeps so much of the energy.

    Args:
        choices: Of a matrix, in the order of their bytes; the last one is that it stays.
    """
    return next((choice for choice in choices if choice.kept >= energy), choices[-1])


def spend(choices: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """A choice for each matrix, within so many bytes for all: greedy, by the energy that a further byte keeps.

    What is not worth its bytes is passed over: the steps are those along the upper hull of each matrix's energy over
    bytes, so that what is found keeps most for the bytes that it takes. Where a step no longer fits, its matrix gets
    what does.

    Args:
        choices: Of each matrix, in the order of their bytes; the first ones together fit.
    """
    hulls = [_hull(one) for one in choices]
    steps = sorted(
        (-_slope(before, after), matrix, place)
        for matrix, hull in enumerate(hulls)
        for place, (before, after) in enumerate(pairwise(hull))
    )
    taken = [hull[0] for hull in hulls]
    left = budget - sum(choice.num_bytes for choice in taken)
    full: set[int] = set()
    for _, matrix, place in steps:
        if matrix in full:
            continue
        wanted, now = hulls[matrix][place + 1], taken[matrix]
        if wanted.num_bytes - now.num_bytes > left:
            full.add(matrix)
            wanted = max(
                (choice for choice in choices[matrix] if choice.num_bytes - now.num_bytes <= left),
                key=lambda choice: choice.kept,
            )
        left -= wanted.num_bytes - now.num_bytes
        taken[matrix] = wanted
    return taken


def _slope(before: Choice, after: Choice) -> float:
    return (after.kept - before.kept) / (after.num_bytes - before.num_bytes)


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those choices that no mixture of two others is better than, in the order of their bytes."""
    hull: list[Choice] = []
    for choice in choices:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull
