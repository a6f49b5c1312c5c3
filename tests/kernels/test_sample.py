"""What the sampling kernels are compiled for, without running them."""

from __future__ import annotations

import torch

from engine.kernels import sample
from engine.kernels.launch import TARGETS, recording
from engine.kernels.sample import Adjustments, DrawParameters


def test_launches_do_not_depend_on_the_batch() -> None:
    def empty(dtype: torch.dtype, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    seen = set()
    for rows, entries in [(1, 1), (2, 16), (16, 17), (37, 256), (256, 5_000)]:
        with recording(TARGETS["sm_90"]) as launches:
            logits = torch.empty(rows, 49_152, device="meta")
            words, floats = empty(torch.int32, rows), empty(torch.float32, rows)
            ids, numbers = empty(torch.int32, entries), empty(torch.float32, entries)
            sample.adjust_logits(logits, Adjustments(ids, ids, numbers, numbers, numbers))
            how = DrawParameters(words, words, floats, words, floats, floats)
            table = empty(torch.int32, 256)
            for filters in (False, True):
                sample.draw(logits, how, filters=filters, last_tokens=table, table_rows=words)
            sample.logprobs_of(logits, words, 3)
        seen.add(frozenset(launches))
    assert len(seen) == 1
    assert len(launches) == 8
