"""AttentionPlan: which queries and keys attention reads, in the terms that every body of it shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The sequences of a flat batch, S of them; all that torch's operators need.

    Attributes:
        query_starts: [S + 1] int32, the row of each sequence's first query in the flat batch.
        starts: [S] int32, the position of that query.
        table_rows: [S] int32, each sequence's row of `block_tables`.
        block_tables: [R, W] int32.
    """

    query_starts: torch.Tensor
    starts: torch.Tensor
    table_rows: torch.Tensor
    block_tables: torch.Tensor
