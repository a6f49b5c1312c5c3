"""What the step loop asks of a loaded model, and what comes back; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from engine.core.batch import Batch, Draw
from engine.core.request import RowResult

Logits = Any
"""[rows that draw, vocabulary] float32, of whatever library computes: the step loop only hands them on."""


class Executor(Protocol):
    """Runs steps. `execute` and `sample` are two calls, so that a step's tokens may be known only between them."""

    def execute(self, batch: Batch) -> Logits:
        """Runs the model: logits [rows that draw, vocabulary] float32, valid until the next step."""
        ...

    def sample(self, logits: Logits, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Draws a token for each row that has a draw, and brings the vectors of those that pool."""
        ...


class Sampled(Protocol):
    """The tokens of a step, perhaps still being drawn."""

    def read(self) -> list[RowResult]:
        """Waits for them: one entry a row of the batch."""
        ...


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens that are there already."""

    results: list[RowResult]

    def read(self) -> list[RowResult]:
        return self.results


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the step loop has to know of a loaded model.

    Attributes:
        max_model_len: Most tokens of a sequence.
        num_blocks: Of the cache, without the null block.
        block_size: Tokens of a block.
        num_bytes: Of the weights of a rank.
        device_type: As torch names it, "cpu" or "cuda".
        is_asynchronous: Whether calls return while the device still works.
        is_chunk_invariant: Whether a token's bits are the same however its prompt is cut into chunks.
        cache_salt: What a cached block depends on besides its tokens.
        recommended_params: The keys of generation_config.json, sampling parameters among them.
        memory_plan: How memory is used, in words.
        num_cache_bytes: As in `engine.core.stats.EngineInfo`.
    """

    max_model_len: int
    vocab_size: int
    hidden_size: int
    num_blocks: int
    block_size: int
    num_bytes: int
    device_type: str
    is_asynchronous: bool
    is_chunk_invariant: bool
    cache_salt: bytes
    recommended_params: dict[str, Any]
    memory_plan: str
    num_cache_bytes: int | None


class LoadedModel(Protocol):
    """A model that is ready to run steps, on one rank or several; see `engine.executor.start`."""

    @property
    def executor(self) -> Executor: ...

    @property
    def facts(self) -> ModelFacts: ...

    def progress(self) -> tuple[int, ...] | None:
        """What is another value when a step has got on; None where that cannot be seen. Any thread may ask."""
        ...

    @property
    def fatal(self) -> tuple[type[Exception], ...]:
        """What steps raise when the device or a rank is lost, not a row."""
        ...

    @property
    def num_compilations(self) -> int:
        """Kernels that were compiled after the start; there should be none."""
        ...

    def check(self) -> None:
        """
        Raises:
            RankFailedError: The engine has lost a rank.
        """
        ...

    def close(self) -> None:
        """Ends the engine's other processes. May be called twice."""
        ...
