"""Pooling: one vector of a prompt's hidden states, behind the final norm.

"last" is the state of the last token. "mean" adds up the states of all, over as many steps as the prompt takes, as
whole multiples of 2^-28: such sums are exact, and the mean's bits do not depend on chunks, company, ranks or device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.core.batch import Batch, BatchRow
from engine.core.executor import Sampled
from engine.core.request import PooledState, RowFailure, RowResult
from engine.executor.sampler import to_host
from engine.models.decoder import Decoder

UNIT = 2.0**-28
"""What states are rounded to for a mean: an error below 2e-9, far less than that of the states themselves."""

LARGEST = 2.0**17
"""States beyond it are refused: sums of 2^17 of them fit 63 bits. A norm's outputs are at most the square root of
their number times its weight.
"""

PIECE = 256
"""Tokens whose states are summed at a time, which bounds what that takes beside a step's own memory."""


@dataclass(slots=True)
class _Mean:
    """The sum over a sequence's first tokens.

    Attributes:
        total: [hidden] int64, in units.
        is_valid: [] bool: whether all of them could be summed.
    """

    num_tokens: int
    total: torch.Tensor
    is_valid: torch.Tensor


class Pooler:
    """Makes the vectors of the rows that ask for one, where the model's last stage is."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        # By slot: before and after the chunk that was computed last, which comes again where its step failed.
        self._means: dict[int, tuple[_Mean, _Mean]] = {}
        self._states: dict[int, torch.Tensor] = {}

    def take(self, batch: Batch, hidden: torch.Tensor | None) -> None:
        """Pools what a step has computed, and forgets what the one before has brought; to be called in each.

        Args:
            hidden: [at least T, hidden], the states of the flat batch before the final norm; None where no row pools.
        """
        self._states = {}
        if hidden is None or not batch.pools or self._model.norm is None:
            return
        last: dict[int, torch.Tensor] = {}
        end = 0
        for number, row in enumerate(batch.rows):
            start, end = end, end + len(row.token_ids)
            if row.pool is None:
                continue
            if row.pool.pooling == "last":
                last[number] = hidden[end - 1 : end]
            else:
                mean = self._add(row, hidden[start:end])
                if row.pool.is_complete:
                    self._states[number] = _value(mean)
        if last:
            states = self._model.final_states(torch.cat(list(last.values()))).float()
            self._states |= zip(last, states, strict=True)

    def join(self, sampled: Sampled) -> Sampled:
        """The step's tokens with its vectors among them."""
        if not self._states:
            return sampled
        rows, states = list(self._states), to_host(torch.stack(list(self._states.values())))
        arrived = None
        if states.is_pinned():
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return _WithStates(sampled, rows, states, arrived)

    def _add(self, row: BatchRow, hidden: torch.Tensor) -> _Mean:
        """The sum with a chunk's states, hidden [tokens, hidden]."""
        before = self._before(row, hidden)
        total, is_valid = before.total, before.is_valid
        for piece in torch.split(hidden, PIECE):
            states = self._model.final_states(piece).double()
            is_valid = is_valid & (states.abs() <= LARGEST).all()
            total = total + (states / UNIT).round().long().sum(0)
        after = _Mean(row.start + len(row.token_ids), total, is_valid)
        self._means[row.slot] = before, after
        return after

    def _before(self, row: BatchRow, hidden: torch.Tensor) -> _Mean:
        """The sum up to the row's start."""
        if row.start == 0:
            zeros = torch.zeros(hidden.shape[1], dtype=torch.int64, device=hidden.device)
            return _Mean(0, zeros, torch.ones((), dtype=torch.bool, device=hidden.device))
        return next(mean for mean in self._means[row.slot] if mean.num_tokens == row.start)


def _value(mean: _Mean) -> torch.Tensor:
    """The mean [hidden] float32; NaN where the states could not be summed."""
    value = (mean.total.double() * UNIT / mean.num_tokens).float()
    return torch.where(mean.is_valid, value, torch.nan)


@dataclass(frozen=True, slots=True)
class _WithStates:
    """A step's tokens, and vectors on their way to the host.

    Attributes:
        rows: The rows of the batch whose the vectors are.
        states: [vectors, hidden] float32.
        arrived: Recorded after the copy; None where it is no matter of time.
    """

    sampled: Sampled
    rows: list[int]
    states: torch.Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> list[RowResult]:
        results = self.sampled.read()
        if self.arrived is not None:
            self.arrived.synchronize()
        for row, state in zip(self.rows, self.states, strict=True):
            results[row] = (
                PooledState(state.numpy().tobytes())
                if state.isfinite().all()
                else RowFailure("no embedding can be made: the hidden states are not finite, or too large")
            )
        return results
