"""The measures: functions of log-probabilities and tokens alone.

perplexity         exp(-mean of log p(token | tokens before it in its window))
KL divergence      sum over v of p(v) (log p(v) - log q(v)), in nats; p: the reference's next-token distribution
top-1 agreement    share of tokens before which both hold the same token the likeliest
first divergence   greedy tokens that both continue a prompt with before the first that differs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `start` up to `end` of a text, of which those from `first_scored` on are scored."""

    start: int
    first_scored: int
    end: int


def make_windows(num_tokens: int, size: int, stride: int) -> list[Window]:
    """Windows that between them score each token of a text but the first exactly once.

    They begin at multiples of `stride` and are `size` long, as in the usual sliding evaluation: a token past the
    first window sees at least size - stride tokens before it. No more than `stride` tokens are scored at a time, so
    the first window, all of whose tokens are scored, comes in parts.

    Args:
        stride: At least 1, and less than `size`: a window's first token has nothing before it.
    """
    assert 1 <= stride < size
    windows = []
    start, scored = 0, 1
    while scored < num_tokens:
        end = min(scored + stride, start + size, num_tokens)
        windows.append(Window(start, scored, end))
        scored = end
        if scored == start + size:
            start += stride
    return windows


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) in nats: log-probabilities [rows, vocabulary] each → [rows]."""
    return (reference.exp() * (reference - other)).sum(dim=-1)


@dataclass(slots=True)
class Scores:
    """What was found before each token of a text but the first, [tokens - 1] each.

    Attributes:
        log_probs: float64, of the token that follows.
        divergences: float64, from the reference.
        agreements: Whether the likeliest token is the reference's.
    """

    log_probs: torch.Tensor
    divergences: torch.Tensor
    agreements: torch.Tensor

    @classmethod
    def empty(cls, size: int) -> Scores:
        """Scores to be filled in by `add`; what is not stays not-a-number."""
        nothing = torch.full((size,), torch.nan, dtype=torch.float64)
        return cls(nothing, nothing.clone(), torch.zeros(size, dtype=torch.bool))

    def add(
        self, indices: Sequence[int], targets: Sequence[int], log_probs: torch.Tensor, reference: torch.Tensor
    ) -> None:
        """Takes in distributions.

        Args:
            indices: Where they belong.
            targets: The tokens that follow.
            log_probs, reference: [rows, vocabulary], of the model and of the reference.
        """
        where = list(indices)
        self.log_probs[where] = log_probs.gather(1, torch.tensor(targets)[:, None])[:, 0].double()
        self.divergences[where] = kl_divergence(reference, log_probs).double()
        self.agreements[where] = log_probs.argmax(dim=1) == reference.argmax(dim=1)

    @property
    def perplexity(self) -> float:
        return float((-self.log_probs.mean()).exp())

    @property
    def kl_divergence(self) -> float:
        return float(self.divergences.mean())

    @property
    def agreement(self) -> float:
        return float(self.agreements.double().mean())


def first_divergence(reference: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs; all of them if none does."""
    pairs = zip(reference, other, strict=True)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), len(reference))


def median_divergence(reference: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Median over prompts of `first_divergence` of their continuations."""
    return float(median(first_divergence(*pair) for pair in zip(reference, other, strict=True)))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats, where less is better in both coordinates; by the first coordinate.

    A point beats another if it is as good in both and better in one.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        # In this order only what is at the front already can beat a point, and the last of it has the least second.
        if not front or points[index][1] < points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front
