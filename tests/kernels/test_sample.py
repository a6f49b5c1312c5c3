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
                sample.draw_tokens(logits, how, filters=filters, last_tokens=table, table_rows=words)
            sample.logprobs_of(logits, words, [3] * rows)
        seen.add(frozenset(launches))
    assert len(seen) == 1
    assert len(launches) == 8


def test_log_probabilities_do_not_depend_on_the_number_of_threads() -> None:
    """Among these rows are some whose sum torch's own logsumexp rounds otherwise on two threads than on one."""
    num_threads = torch.get_num_threads()
    rows = [
        torch.randn(1, 49_152, generator=torch.Generator().manual_seed(seed)) * (1 + seed % 7)
        for seed in range(60)
    ]
    tokens = torch.zeros(1, dtype=torch.int32)
    found = []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            found.append(torch.cat([sample.logprobs_of(row, tokens, [1]).chosen for row in rows]))
    finally:
        torch.set_num_threads(num_threads)
    expected = torch.cat([row.double().log_softmax(dim=1)[:, 0] for row in rows])
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=1e-5)
    assert all(torch.equal(found[0], other) for other in found[1:])
