"""What steps cost, learned from those that have run: a sum of their parts, each at its price.

    seconds = step + prompt_token · tokens of prompts + decode · sequences that decode + read · keys that tokens read

The prices are those of least squares, none below zero, in which a step counts less the longer ago it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

KEPT = 0.99
"""What is left of the weight of a step one step later."""

MAX_SURPRISE = 4.0
"""A step that took more than so many times what was expected counts less: one that was held up says little."""

MOST_TOKENS = 2**31
"""Where nothing is known that would bound them."""

SWEEPS = 4
"""Passes over the prices after each step: the last prices are near the next."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """What a step computes.

    Attributes:
        num_prompt_tokens: Tokens of rows of several.
        num_decodes: Rows of one token.
        num_reads: Keys that all tokens read, a token's own and those before it.
    """

    num_prompt_tokens: int
    num_decodes: int
    num_reads: int

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int]]) -> StepSize:
        """The size of a step of these rows, each from one token of its sequence to before another."""
        num_prompt_tokens, num_decodes, num_reads = 0, 0, 0
        for start, end in chunks:
            num_tokens = end - start
            num_prompt_tokens += num_tokens if num_tokens > 1 else 0
            num_decodes += num_tokens == 1
            # Each token reads itself and those before it.
            num_reads += num_tokens * (start + end + 1) // 2
        return cls(num_prompt_tokens, num_decodes, num_reads)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Prices in seconds; all are zero before the first step.

    Attributes:
        step: What a step costs, however small.
        prompt_token: A token of a prompt.
        decode: A sequence that decodes.
        read: A key that a token reads, in every layer.
    """

    step: float = 0.0
    prompt_token: float = 0.0
    decode: float = 0.0
    read: float = 0.0

    def seconds(self, size: StepSize) -> float:
        return (
            self.step
            + self.prompt_token * size.num_prompt_tokens
            + self.decode * size.num_decodes
            + self.read * size.num_reads
        )

    def num_prompt_tokens(self, seconds: float, start: int) -> int:
        """How many tokens of a prompt fit a time, of one whose first `start` tokens are computed."""
        price = self.prompt_token + self.read * start
        # A chunk of n tokens reads start · n + n² / 2 keys; the root is written so that nothing cancels.
        divisor = price + (price**2 + 2 * self.read * seconds) ** 0.5
        return int(min(2 * seconds / divisor, MOST_TOKENS)) if divisor > 0.0 else MOST_TOKENS


class StepCostModel:
    """Learns the prices."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self._products = [[0.0] * 4 for _ in range(4)]
        self._targets = [0.0] * 4
        self._prices = [0.0] * 4

    def observe(self, size: StepSize, seconds: float) -> None:
        """Takes in what a step has taken."""
        parts = (1.0, float(size.num_prompt_tokens), float(size.num_decodes), float(size.num_reads))
        if seconds <= 0.0:
            return
        # Errors count relative to what a step takes, not those of long steps more.
        weight = 1.0 / max(self.costs.seconds(size), seconds / MAX_SURPRISE) ** 2
        for row, part, products in zip(range(4), parts, self._products, strict=True):
            self._targets[row] = KEPT * self._targets[row] + weight * part * seconds
            for column, other in enumerate(parts):
                products[column] = KEPT * products[column] + weight * part * other
        for _ in range(SWEEPS):
            # Parts first: what they explain is not the step's.
            for row in (1, 3, 2, 0):
                self._improve(row)
        self.costs = StepCosts(*self._prices)

    def _improve(self, row: int) -> None:
        """Sets one price to the best beside the others."""
        products, prices = self._products[row], self._prices
        # Nothing is left of the steps that had this part: its price stays.
        if products[row] < 1e-200:
            return
        others = sum(products[other] * prices[other] for other in range(4) if other != row)
        prices[row] = max(0.0, (self._targets[row] - others) / products[row])
