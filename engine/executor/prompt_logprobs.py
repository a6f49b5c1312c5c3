"""Log-probabilities of prompts: the head over the rows of a step that precede tokens which are asked for.

A step keeps the hidden states of its chunks. Logits of some rows at a time become log-probabilities, by the operation
that gives those of drawn tokens, before the next ones take their place: memory does not grow with the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.core.batch import Batch, Scoring
from engine.core.executor import Sampled
from engine.core.request import PromptLogprobs, RowFailure, RowResult, SampledToken, ScoredPrompt
from engine.executor.flat_batch import Int32Array
from engine.executor.sampler import to_device, to_host
from engine.kernels.sample import Logprobs, logprobs_of


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """The tokens of a step, and log-probabilities of prompts on their way to the host.

    Attributes:
        scorings: One a row of the batch.
        blocks: The log-probabilities that they ask for, in their order.
        arrived: Recorded after the copies; None where they are no matter of time.
    """

    sampled: Sampled
    scorings: list[Scoring | None]
    blocks: list[Logprobs]
    arrived: torch.cuda.Event | None

    def read(self) -> list[RowResult]:
        """Waits for both."""
        results = self.sampled.read()
        if self.arrived is not None:
            self.arrived.synchronize()
        chosen = np.concatenate([block.chosen.numpy() for block in self.blocks])
        ranks = np.concatenate([block.ranks.numpy() for block in self.blocks])
        top_ids = _stacked([block.top_ids for block in self.blocks]).astype(np.int32)
        top_values = _stacked([block.top_values for block in self.blocks])
        scored: list[RowResult] = []
        start = 0
        for scoring, result in zip(self.scorings, results, strict=True):
            if scoring is None:
                scored.append(result)
                continue
            rows = slice(start, start + len(scoring.token_ids))
            start = rows.stop
            if isinstance(result, RowFailure):
                scored.append(result)
            elif np.isnan(chosen[rows]).any():
                scored.append(
                    RowFailure("the prompt has no log-probabilities: logits are not finite (NaN or infinity)")
                )
            else:
                assert result is None or isinstance(result, SampledToken)
                logprobs = PromptLogprobs(
                    scoring.start,
                    scoring.token_ids,
                    chosen[rows].tobytes(),
                    ranks[rows].tobytes(),
                    top_ids[rows, : scoring.num_top].tobytes(),
                    top_values[rows, : scoring.num_top].tobytes(),
                )
                scored.append(ScoredPrompt(logprobs, result))
        return scored


def score_prompts(
    sampled: Sampled,
    batch: Batch,
    max_rows: int,
    logits_of: Callable[[Int32Array], torch.Tensor],
    device: torch.device,
) -> Sampled:
    """Adds the log-probabilities of prompts that the batch asks for to what was drawn.

    Args:
        max_rows: Rows of logits that there may be at a time.
        logits_of: The logits [rows, vocabulary] float32 of rows of the flat batch, valid until it is called again.
    """
    if batch.num_scored_tokens == 0:
        return sampled
    rows: list[int] = []
    token_ids: list[int] = []
    nums: list[int] = []
    start = 0
    for row in batch.rows:
        if row.scoring is not None:
            count = len(row.scoring.token_ids)
            rows += range(start + row.scoring.first, start + row.scoring.first + count)
            token_ids += row.scoring.token_ids
            nums += [row.scoring.num_top] * count
        start += len(row.token_ids)
    blocks = []
    for first in range(0, len(rows), max_rows):
        part = slice(first, first + max_rows)
        logits = logits_of(np.array(rows[part], np.int32))
        targets = to_device(torch.tensor(token_ids[part], dtype=torch.int32), device)
        found = logprobs_of(logits, targets, nums[part])
        blocks.append(Logprobs(*(to_host(getattr(found, name)) for name in Logprobs.__slots__)))
    arrived = None
    if device.type == "cuda":
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
    return ScoredRows(sampled, [row.scoring for row in batch.rows], blocks, arrived)


def _stacked(parts: list[torch.Tensor]) -> np.ndarray[tuple[int, int], np.dtype[np.generic]]:
    """One below the other, each as wide as the widest: [rows, k]."""
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part.numpy(), ((0, 0), (0, width - part.shape[1]))) for part in parts])
