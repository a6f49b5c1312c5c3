"""What the step loop asks of a loaded model, and what comes back; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from engine.core.batch import Batch, Draw
from engine.core.request import RowFailure, SampledToken

Logits = Any
"""[rows that draw, vocabulary] float32, of whatever library computes: the step loop only hands them on."""


class Executor(Protocol):
    """Runs steps. `execute` and `sample` are two calls, so that a step's tokens may be known only between them."""

    def execute(self, batch: Batch) -> Logits:
        """Runs the model: logits [rows that draw, vocabulary] float32, valid until the next step."""
        ...

    def sample(self, logits: Logits, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Draws a token for each row that has a draw."""
        ...


class Sampled(Protocol):
    """The tokens of a step, perhaps still being drawn."""

    def read(self) -> list[SampledToken | RowFailure | None]:
        """Waits for them: one entry a row of the batch, None where its prompt is not through."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens that are there already."""

    results: list[SampledToken | RowFailure | None]

    def read(self) -> list[SampledToken | RowFailure | None]:
        return self.results
