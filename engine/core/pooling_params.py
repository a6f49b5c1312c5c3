"""PoolingParams: which vector of a prompt is asked for, validated on construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from engine.core.batch import Pooling
from engine.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How an embedding is made of a prompt's hidden states behind the final norm.

    Attributes:
        pooling: "last", the state of the last token, or "mean", that of all.
        dimensions: So many of the vector's first numbers, for models whose embeddings were trained to be cut off
            (Matryoshka); None for all.
        normalize: Whether the vector gets length 1, after that.
    """

    pooling: Pooling = "last"
    dimensions: int | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            words = " or ".join(map(repr, get_args(Pooling)))
            raise RequestError(f"pooling must be {words}, got {self.pooling!r}", "pooling")
        if self.dimensions is not None and self.dimensions < 1:
            raise RequestError(f"dimensions must be at least 1, got {self.dimensions}", "dimensions")

    def finish(self, state: bytes) -> list[float]:
        """The embedding, float32 numbers, of what the engine has pooled, as `PooledState` has it."""
        vector = np.frombuffer(state, "<f4")[: self.dimensions].astype(np.float64)
        length = np.sqrt(np.square(vector).sum())
        if self.normalize and length > 0:
            vector /= length
        numbers: list[float] = vector.astype(np.float32).tolist()
        return numbers
