"""Bias, penalties and bans of the sequences that run: made when a sequence starts, then only brought up to date."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.core.batch import Draw
from engine.core.sampling_params import SamplingParams
from engine.kernels.sample import Adjustments

Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Token ids, bias, repetition and subtract, as of `Adjustments`."""


class AdjustmentTable:
    """What changes the logits of each running sequence."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, _Row] = {}

    def update(self, draws: Sequence[Draw], sequences: Sequence[Hashable]) -> Adjustments | None:
        """The bias, penalties and bans of draws, on the CPU; None where there are none.

        Args:
            sequences: For each draw, what is its sequence's own while that runs. A table that is asked for another's
                draw under the same name makes its row anew.
        """
        old, self._rows = self._rows, {}
        found: list[tuple[int, Columns]] = []
        for number, (draw, sequence) in enumerate(zip(draws, sequences, strict=True)):
            if not (draw.params.logit_bias or draw.params.has_penalties or draw.banned_token_ids):
                continue
            row = old.get(sequence)
            if row is None or not row.precedes(draw):
                row = _Row(draw)
            row.follow(draw.output_token_ids)
            self._rows[sequence] = row
            found.append((number, row.columns()))
        if not found:
            return None
        numbers, rows = zip(*found, strict=True)
        token_ids, bias, repetition, subtract = map(np.concatenate, zip(*rows, strict=True))
        sizes = [len(columns[0]) for columns in rows]
        return Adjustments(
            rows=torch.from_numpy(np.repeat(np.array(numbers, np.int32), sizes)),
            token_ids=torch.from_numpy(token_ids),
            bias=torch.from_numpy(bias),
            repetition=torch.from_numpy(repetition),
            subtract=torch.from_numpy(subtract),
        )


@dataclass(slots=True)
class _Use:
    """A token in the output: its entry, and how often it is there."""

    place: int
    count: int = 0


class _Row:
    """One sequence's entries, in the order in which their tokens came up."""

    def __init__(self, draw: Draw) -> None:
        self._params: SamplingParams = draw.params
        self._banned, self._num_prompt_tokens = draw.banned_token_ids, len(draw.prompt_token_ids)
        self._num_output_tokens, self._last_token = 0, -1
        self._repetition = np.float32(draw.params.repetition_penalty)
        self._frequency = np.float32(draw.params.frequency_penalty)
        self._presence = np.float32(draw.params.presence_penalty)
        prompt = draw.prompt_token_ids if draw.params.repetition_penalty != 1.0 else ()
        seen = dict.fromkeys(prompt)
        token_ids = [*dict.fromkeys((*draw.params.logit_bias, *draw.banned_token_ids, *seen))]
        self._uses = {token_id: _Use(place) for place, token_id in enumerate(token_ids)}
        room = 2 * len(token_ids) + 64
        self._token_ids = np.zeros(room, np.int32)
        self._token_ids[: len(token_ids)] = token_ids
        self._bias, self._subtract = np.zeros((2, room), np.float32)
        self._repetitions = np.ones(room, np.float32)
        for token_id, bias in draw.params.logit_bias.items():
            self._bias[self._uses[token_id].place] = bias
        self._bias[[self._uses[token_id].place for token_id in draw.banned_token_ids]] = -np.inf
        self._repetitions[[self._uses[token_id].place for token_id in seen]] = self._repetition

    def precedes(self, draw: Draw) -> bool:
        """Whether the draw is one of this sequence, with as many or more tokens."""
        params, count = draw.params, self._num_output_tokens
        return (
            (params is self._params or params == self._params)
            and draw.banned_token_ids == self._banned
            and len(draw.prompt_token_ids) == self._num_prompt_tokens
            and len(draw.output_token_ids) >= count
            and (count == 0 or draw.output_token_ids[count - 1] == self._last_token)
        )

    def follow(self, output_token_ids: Sequence[int]) -> None:
        """Takes in the output's tokens that are new."""
        for token_id in output_token_ids[self._num_output_tokens :]:
            use = self._uses.get(token_id)
            if use is None:
                use = self._uses[token_id] = _Use(len(self._uses))
                self._make_room(len(self._uses))
                self._token_ids[use.place] = token_id
            use.count += 1
            self._repetitions[use.place] = self._repetition
            self._subtract[use.place] = self._frequency * np.float32(use.count) + self._presence
            self._last_token = token_id
        self._num_output_tokens = len(output_token_ids)

    def columns(self) -> Columns:
        """Its entries, which the next `follow` may change."""
        size = len(self._uses)
        return self._token_ids[:size], self._bias[:size], self._repetitions[:size], self._subtract[:size]

    def _make_room(self, size: int) -> None:
        more = size - len(self._token_ids)
        if more <= 0:
            return
        more += size
        self._token_ids = np.concatenate((self._token_ids, np.zeros(more, np.int32)))
        self._bias = np.concatenate((self._bias, np.zeros(more, np.float32)))
        self._subtract = np.concatenate((self._subtract, np.zeros(more, np.float32)))
        self._repetitions = np.concatenate((self._repetitions, np.ones(more, np.float32)))
