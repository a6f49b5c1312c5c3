"""CpuExecutor: runs a step on the CPU as one call of the C kernels.

The model's forward pass is recorded once, over buffers for the largest step. A step writes its inputs where the
program reads them, runs it, and finds the logits where they always are.
"""

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
from engine.kernels import cpu
from engine.kernels.attention.in_c import SEGMENT, CpuPlan, gather, group_segments
from engine.kernels.attention.kv_layer import KVCache
from engine.models.attention import PagedInputs
from engine.models.config import RopeConfig
from engine.models.decoder import Decoder
from engine.models.rope import RotaryTable
from engine.models.sharding import shard_of_config


class CpuExecutor:
    """Owns the program and its buffers.

    Args:
        rotary: By rope, the table for every position that a sequence can reach.

    Attributes:
        program: One step of the model.
        seconds: [calls of the program] float64, to which each step adds their durations; None: not measured.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        rotary: dict[RopeConfig, RotaryTable],
        limits: SchedulerConfig,
    ) -> None:
        self.seconds: torch.Tensor | None = None
        self._block_size = cache.block_size
        num_tokens, num_rows = limits.max_num_batched_tokens, limits.max_num_seqs
        self._tables = BlockTables(num_rows, -(-limits.max_model_len // cache.block_size))
        self._last_tokens = np.zeros(num_rows, np.int32)
        self._changes = AdjustmentTable()
        self._pooler = Pooler(model)
        # What a step writes, as numpy arrays; the program reads the same memory.
        self._counts = np.zeros(3, np.int64)
        self._token_ids, self._positions, self._slots = (np.zeros(num_tokens, np.int32) for _ in range(3))
        self._starts, self._table_rows, self._partial_starts = (
            np.zeros(num_rows, np.int32) for _ in range(3)
        )
        self._query_starts, self._last_rows = np.zeros(num_rows + 1, np.int32), np.zeros(num_rows, np.int32)
        of_tokens, of_rows, of_draws = (torch.from_numpy(self._counts[i : i + 1]) for i in range(3))
        config = shard_of_config(model.config, model.group.shard)
        num_segments = num_rows * -(-limits.max_model_len // SEGMENT)
        plan = CpuPlan.make(
            num_sequences=of_rows,
            query_starts=torch.from_numpy(self._query_starts),
            starts=torch.from_numpy(self._starts),
            table_rows=torch.from_numpy(self._table_rows),
            block_tables=torch.from_numpy(self._tables.values),
            partial_starts=torch.from_numpy(self._partial_starts),
            max_segments=num_segments,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
        )
        inputs = PagedInputs(
            torch.from_numpy(self._positions),
            torch.from_numpy(self._slots),
            dict.fromkeys(config.sliding_windows, plan),
            rotary,
            batch_invariant=True,
        )
        self.program = cpu.Program(torch.get_num_threads())
        with torch.inference_mode():
            with self.program.recording(of_tokens):
                group_segments(plan, cache.block_size)
                self._hidden = hidden = model(torch.from_numpy(self._token_ids), cache, inputs)
            self._logits = torch.empty(0, 0)
            if model.pipeline.is_last:
                with self.program.recording(of_draws):
                    self._logits = model.logits(gather(hidden, torch.from_numpy(self._last_rows)))

    @torch.inference_mode()
    def execute(self, batch: Batch) -> torch.Tensor:
        """Logits [rows that draw, vocabulary] float32, valid until the next step; none but on the last stage."""
        num_draws = self._write(batch)
        self.program.run(self.seconds)
        self._pooler.take(batch, self._hidden)
        return self._logits[:num_draws]

    def _write(self, batch: Batch) -> int:
        """Writes the step's inputs; how many rows draw."""
        rows = batch.rows
        self._tables.update(rows)
        tokens = flatten(rows, self._tables.values, self._block_size)
        count, num_tokens = len(rows), len(tokens.token_ids)
        self._token_ids[:num_tokens] = tokens.with_drawn(self._last_tokens)
        self._positions[:num_tokens] = tokens.positions
        self._slots[:num_tokens] = tokens.slots
        self._query_starts[1 : count + 1] = tokens.ends
        self._starts[:count] = tokens.starts
        self._table_rows[:count] = tokens.row_slots
        segments = tokens.starts // SEGMENT + 1
        self._partial_starts[:count] = np.cumsum(segments) - segments
        last_rows = tokens.last_rows(rows)
        self._last_rows[: len(last_rows)] = last_rows
        self._counts[:] = num_tokens, count, len(last_rows)
        return len(last_rows)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Draws a token for each row that has a draw."""
        last_tokens = torch.from_numpy(self._last_tokens)
        inputs = SamplerInputs.on_cpu(batch, last_tokens, self._changes)
        sampled = self._pooler.join(sample(logits, draws, inputs))
        return score_prompts(sampled, batch, len(self._logits), self._logits_of, logits.device)

    def _logits_of(self, rows: Int32Array) -> torch.Tensor:
        """The logits of rows of the last step, where those of its draws were."""
        self._last_rows[: len(rows)] = rows
        self._counts[2] = len(rows)
        self.program.run(part=1)
        return self._logits[: len(rows)]
