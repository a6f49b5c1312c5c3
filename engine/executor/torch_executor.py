"""TorchExecutor: runs a step on the CPU with torch's operators, where there are no C kernels for it."""

from __future__ import annotations

import numpy as np
import torch

from engine.config import SchedulerConfig
from engine.core.batch import Batch, Draw
from engine.core.executor import Sampled
from engine.executor.adjustments import AdjustmentTable
from engine.executor.flat_batch import BlockTables, Int32Array, flatten
from engine.executor.pooling import Pooler
from engine.executor.prompt_logprobs import score_prompts
from engine.executor.sampler import SamplerInputs, sample
from engine.kernels.attention.kv_layer import KVCache
from engine.kernels.attention.plan import AttentionPlan
from engine.models.attention import PagedInputs
from engine.models.config import RopeConfig
from engine.models.decoder import Decoder
from engine.models.rope import RotaryTable


class TorchExecutor:
    """Turns batches into tensors, runs the model over them and draws the tokens.

    Args:
        rotary: By rope, the table for every position that a sequence can reach.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        rotary: dict[RopeConfig, RotaryTable],
        limits: SchedulerConfig,
    ) -> None:
        self.model, self.cache, self.rotary = model, cache, rotary
        self._tables = BlockTables(limits.max_num_seqs, -(-limits.max_model_len // cache.block_size))
        self._last_tokens = np.zeros(limits.max_num_seqs, np.int32)
        self._changes = AdjustmentTable()
        self._pooler = Pooler(model)
        self._max_rows = limits.max_num_seqs
        self._hidden = torch.empty(0, 0)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> torch.Tensor:
        """Logits [rows that draw, vocabulary] float32, on the last stage; the slots of the cache are filled."""
        self._tables.update(batch.rows)
        tokens = flatten(batch.rows, self._tables.values, self.cache.block_size)
        plan = AttentionPlan(
            query_starts=torch.from_numpy(np.append(np.int32(0), tokens.ends)),
            starts=torch.from_numpy(tokens.starts),
            table_rows=torch.from_numpy(tokens.row_slots),
            block_tables=torch.from_numpy(self._tables.values),
        )
        inputs = PagedInputs(
            torch.from_numpy(tokens.positions),
            torch.from_numpy(tokens.slots),
            dict.fromkeys(self.model.config.sliding_windows, plan),
            self.rotary,
            batch_invariant=False,
        )
        token_ids = torch.from_numpy(tokens.with_drawn(self._last_tokens))
        self._hidden = self.model(token_ids, self.cache, inputs)
        self._pooler.take(batch, self._hidden)
        if not self.model.pipeline.is_last:
            return torch.empty(0, 0)
        return self._logits_of(tokens.last_rows(batch.rows))

    def _logits_of(self, rows: Int32Array) -> torch.Tensor:
        return self.model.logits(self._hidden.index_select(0, torch.from_numpy(rows)))

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Draws a token for each row that has a draw."""
        last_tokens = torch.from_numpy(self._last_tokens)
        inputs = SamplerInputs.on_cpu(batch, last_tokens, self._changes)
        sampled = self._pooler.join(sample(logits, draws, inputs))
        return score_prompts(sampled, batch, self._max_rows, self._logits_of, logits.device)
