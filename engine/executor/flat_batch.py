"""A step's rows as one flat batch: their tokens one after the other, and the block tables that they grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.core.batch import BatchRow
from engine.core.kv_cache import NULL_BLOCK

Int32Array = np.ndarray[tuple[int], np.dtype[np.int32]]


class BlockTables:
    """The block tables of the running sequences, a row for each place in the batch.

    Attributes:
        values: [num_rows, width] int32.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        self.values = np.zeros((num_rows, width), dtype=np.int32)
        self._admissions = [-1] * num_rows
        self._num_blocks = [0] * num_rows

    def update(self, rows: Sequence[BatchRow]) -> tuple[list[int], list[int]]:
        """Adds what the rows have more; the additions as indices into the flattened tables and blocks."""
        indices: list[int] = []
        blocks: list[int] = []
        width = self.values.shape[1]
        for row in rows:
            if self._admissions[row.slot] != row.admission:
                self._admissions[row.slot] = row.admission
                self._num_blocks[row.slot] = 0
            known, total = self._num_blocks[row.slot], len(row.block_table)
            if known < total:
                added = row.block_table[known:]
                self.values[row.slot, known:total] = added
                indices += range(row.slot * width + known, row.slot * width + total)
                blocks += added
                self._num_blocks[row.slot] = total
        return indices, blocks

    def forget(self, rows: Sequence[BatchRow]) -> None:
        """Lets the rows' additions come again."""
        for row in rows:
            self._admissions[row.slot] = -1


@dataclass(frozen=True, slots=True)
class FlatTokens:
    """The tokens of a step, [T] int32 each, and its rows, [R] int32 each.

    Attributes:
        token_ids: -1 - slot stands for the token that was drawn last in that place of the batch.
        slots: Where each token's key and value go; what is stored already goes to the null block.
        starts, ends: Position of each row's first token, and its end in the flat batch.
        row_slots: Each row's place in the running batch.
    """

    token_ids: Int32Array
    positions: Int32Array
    slots: Int32Array
    starts: Int32Array
    ends: Int32Array
    row_slots: Int32Array

    def with_drawn(self, last_tokens: Int32Array) -> Int32Array:
        """The token ids, with what was drawn last in each place of the batch, `last_tokens` [slots], filled in."""
        drawn = last_tokens[np.maximum(-1 - self.token_ids, 0)]
        return np.where(self.token_ids < 0, drawn, self.token_ids)

    def last_rows(self, rows: Sequence[BatchRow]) -> Int32Array:
        """The rows of the flat batch that draw: the last of each of `rows` that has a draw."""
        return self.ends[[row.draw is not None for row in rows]] - 1


def flatten(
    rows: Sequence[BatchRow], tables: np.ndarray[tuple[int, int], np.dtype[np.int32]], block_size: int
) -> FlatTokens:
    """The rows one after the other.

    Args:
        tables: The block table of each place in the running batch.
    """
    count = len(rows)
    lengths = np.fromiter((len(row.token_ids) for row in rows), np.int32, count)
    starts = np.fromiter((row.start for row in rows), np.int32, count)
    row_slots = np.fromiter((row.slot for row in rows), np.int32, count)
    num_stored = np.fromiter((row.num_stored_tokens for row in rows), np.int32, count)
    ends = np.cumsum(lengths, dtype=np.int32)
    num_tokens = int(ends[-1])
    token_ids = np.fromiter((token for row in rows for token in row.token_ids), np.int32, num_tokens)
    positions, token_slots, stored = starts, row_slots, num_stored
    if num_tokens > count:
        offsets = np.arange(num_tokens, dtype=np.int32) - np.repeat(ends - lengths, lengths)
        positions = np.repeat(starts, lengths) + offsets
        token_slots, stored = np.repeat(row_slots, lengths), np.repeat(num_stored, lengths)
    blocks = np.where(positions < stored, NULL_BLOCK, tables[token_slots, positions // block_size])
    return FlatTokens(
        token_ids=np.where(token_ids < 0, -1 - token_slots, token_ids),
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        starts=starts,
        ends=ends,
        row_slots=row_slots,
    )
