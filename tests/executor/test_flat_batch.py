"""A step's rows as one flat batch."""

from __future__ import annotations

import numpy as np

from engine.core.batch import PENDING, BatchRow, Draw
from engine.core.sampling_params import SamplingParams
from engine.executor.flat_batch import BlockTables, flatten

DRAW = Draw(params=SamplingParams(), seed=0, index=0, position=0)


def test_rows_lie_one_after_the_other() -> None:
    rows = [
        BatchRow([PENDING], 9, 0, [1, 2, 3], DRAW, slot=2),
        # Tokens that are stored already are written to the null block.
        BatchRow([5, 6, 7], start=6, num_stored_tokens=8, block_table=[4, 9, 2], draw=None, slot=0),
        BatchRow([8, 9], 0, 0, [7], DRAW, slot=1),
    ]
    tables = BlockTables(num_rows=3, width=4)
    tables.update(rows)
    tokens = flatten(rows, tables.values, block_size=4)
    assert tokens.positions.tolist() == [9, 6, 7, 8, 0, 1]
    assert tokens.slots.tolist() == [3 * 4 + 1, 2, 3, 2 * 4 + 0, 7 * 4 + 0, 7 * 4 + 1]
    assert tokens.starts.tolist() == [9, 6, 0]
    assert tokens.ends.tolist() == [1, 4, 6]
    assert tokens.row_slots.tolist() == [2, 0, 1]
    assert tokens.with_drawn(np.array([10, 20, 30], np.int32)).tolist() == [30, 5, 6, 7, 8, 9]
    assert tokens.last_rows(rows).tolist() == [0, 5]
