"""TorchExecutor: runs a step on the CPU with torch's operators, where there are no C kernels for it."""

from __future__ import annotations

import numpy as np
import torch

from engine.core.batch import PENDING, Batch, Draw
from engine.core.executor import Drawn, Sampled
from engine.core.request import RowFailure, SampledToken
from engine.executor.sampler import sample
from engine.executor.step_buffers import Int32Array
from engine.kernels.attention.in_torch import plan_attention, slot_mapping
from engine.kernels.attention.kv_layer import KVCache
from engine.models.attention import TorchInputs
from engine.models.config import RopeConfig
from engine.models.decoder import Decoder
from engine.models.rope import RotaryTable


class TorchExecutor:
    """Turns batches into tensors, runs the model over them and draws the tokens.

    Args:
        rotary: By rope, the table for every position that a sequence can reach.
        max_num_seqs: Most sequences that run at a time.
    """

    def __init__(
        self, model: Decoder, cache: KVCache, rotary: dict[RopeConfig, RotaryTable], max_num_seqs: int
    ) -> None:
        self.model, self.cache, self.rotary = model, cache, rotary
        self._last_tokens = np.zeros(max_num_seqs, np.int32)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> torch.Tensor:
        """Logits [rows that draw, vocabulary] float32, on the last stage; the slots of the cache are filled."""
        rows = batch.rows
        token_ids = [
            int(self._last_tokens[row.slot]) if token == PENDING else token
            for row in rows
            for token in row.token_ids
        ]
        positions = torch.tensor([row.start + i for row in rows for i in range(len(row.token_ids))])
        layer = self.cache.layer(0)
        inputs = TorchInputs(
            slots=slot_mapping(rows, self.cache.block_size),
            plans={
                window: plan_attention(rows, layer, window, self.model.dtype)
                for window in set(self.model.config.sliding_windows)
            },
            rotary={rope: table.at(positions, self.model.dtype) for rope, table in self.rotary.items()},
        )
        hidden = self.model(torch.tensor(token_ids), self.cache, inputs)
        if not self.model.pipeline.is_last:
            return torch.empty(0, 0)
        last = []
        end = 0
        for row in rows:
            end += len(row.token_ids)
            if row.draw is not None:
                last.append(end - 1)
        return self.model.logits(hidden.index_select(0, torch.tensor(last, dtype=torch.int64)))

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Draws a token for each row that has a draw."""
        return Drawn(read_drawn(logits, batch, draws, self._last_tokens))


def read_drawn(
    logits: torch.Tensor, batch: Batch, draws: list[Draw | None], last_tokens: Int32Array
) -> list[SampledToken | RowFailure | None]:
    """Draws on the CPU, and notes the tokens in `last_tokens` ([slots] int32)."""
    wanted = [draw for draw in draws if draw is not None]
    drawn = iter(sample(logits, wanted) if wanted else [])
    results = [None if draw is None else next(drawn) for draw in draws]
    for row, result in zip(batch.rows, results, strict=True):
        if isinstance(result, SampledToken):
            last_tokens[row.slot] = result.token_id
    return results
