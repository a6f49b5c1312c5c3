"""TritonExecutor: runs steps on a GPU, or wherever Triton's kernels run, without waiting for them.

one copy of a step's inputs ─► block tables ─► forward pass (a CUDA graph for decodes) ─► logits
the sampler ─► last tokens, which the next step reads on the device ─► copy to the host
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.config import SchedulerConfig
from engine.core.batch import Batch, Draw
from engine.core.executor import Sampled
from engine.errors import ConfigError
from engine.executor.adjustments import AdjustmentTable
from engine.executor.cuda_graphs import CudaGraphs, graph_sizes
from engine.executor.flat_batch import Int32Array
from engine.executor.pooling import Pooler
from engine.executor.prompt_logprobs import score_prompts
from engine.executor.sampler import SamplerInputs, sample, sequences_of, to_device
from engine.executor.step_buffers import AttentionForms, StepBuffers, StepInputs
from engine.kernels.attention.in_triton import form, make_scratch, scratch_capacity
from engine.kernels.attention.kv_layer import KVCache
from engine.kernels.launch import target_of
from engine.kernels.step_triton import resolve_tokens, update_tables
from engine.models.attention import PagedInputs
from engine.models.config import RopeConfig
from engine.models.decoder import Decoder
from engine.models.rope import RotaryTable
from engine.parallel.pipeline import waiting_for_device


class TritonExecutor:
    """Owns what steps work with on the device besides weights and cache.

    Args:
        rotary: By rope, the table for every position that a sequence can reach.
        num_slots: Tokens that the cache will hold: buffers are made for so many.
        batch_invariant: Attention in one form for chunks and decodes, so that a token does not depend on its chunk.

    Attributes:
        cache: May be replaced until `capture_graphs`.
        graphs: Captured decodes; None until `capture_graphs`.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        rotary: dict[RopeConfig, RotaryTable],
        limits: SchedulerConfig,
        num_slots: int,
        batch_invariant: bool,
    ) -> None:
        self.model, self.cache, self.rotary, self.limits = model, cache, rotary, limits
        self.device = cache.data.device
        self.graphs: CudaGraphs | None = None
        self.last_tokens = torch.zeros(limits.max_num_seqs, dtype=torch.int32, device=self.device)
        config = model.config
        self.buffers = StepBuffers(
            limits,
            cache.block_size,
            sorted(set(config.sliding_windows), key=lambda window: window or limits.max_model_len),
            _attention_forms(model, cache, limits, num_slots, batch_invariant),
            self.device,
            lambda: waiting_for_device(model.group, model.pipeline),
        )
        self._inputs: StepInputs
        # Of a step that has log-probabilities of prompts to bring, until the next one.
        self._kept: torch.Tensor | None = None
        self._changes = AdjustmentTable()
        self._pooler = Pooler(model)

    @torch.inference_mode()
    def capture_graphs(self, make_decodes: Callable[[int], Batch]) -> None:
        """Captures the forward pass of decodes; call once everything is compiled.

        Args:
            make_decodes: A batch of so many decodes that touches no sequence's blocks.
        """

        def prepare(size: int) -> None:
            self._write(make_decodes(size), size)

        # One for all sizes: in the graphs' own memory each would keep its own.
        logits = torch.empty(
            graph_sizes(self.limits.max_num_seqs)[-1], self.model.config.vocab_size, device=self.device
        )

        def run(size: int) -> torch.Tensor:
            return logits[:size].copy_(self.model.head(self._hidden(self.buffers.padded(size))))

        self.graphs = CudaGraphs(prepare, run, self.limits.max_num_seqs)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> torch.Tensor:
        """Launches the forward pass: logits [rows that draw, vocabulary] float32."""
        num_draws = sum(row.draw is not None for row in batch.rows)
        # A graph keeps no hidden states.
        keeps_states = batch.pools or batch.num_scored_tokens > 0
        is_decode = num_draws > 0 and not keeps_states and all(len(row.token_ids) == 1 for row in batch.rows)
        size = self.graphs.size_for(len(batch.rows)) if self.graphs is not None and is_decode else None
        inputs = self._inputs = self._write(batch, size)
        self._kept = None
        if self.graphs is not None and inputs.padded_size is not None:
            self._pooler.take(batch, None)
            logits = self.graphs.replay(inputs.padded_size)
            if num_draws == len(batch.rows):
                return logits[:num_draws]
            return logits.index_select(0, inputs.last_rows[:num_draws])
        hidden = self._hidden(inputs)
        self._pooler.take(batch, hidden)
        if batch.num_scored_tokens > 0:
            self._kept = hidden
        if num_draws == 0:
            return torch.empty(0, self.model.config.vocab_size, device=self.device)
        return self._logits_of(hidden, inputs.last_rows[:num_draws])

    def _write(self, batch: Batch, size: int | None) -> StepInputs:
        """Brings a step's inputs to the device, and its block tables up to date."""
        try:
            inputs = self.buffers.write(batch, size)
            if len(inputs.update_blocks):
                update_tables(self.buffers.tables, inputs.update_indices, inputs.update_blocks)
        except Exception:
            self.buffers.forget(batch.rows)
            raise
        return inputs

    def _logits_of(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits of these rows of the flat batch, [n] int32."""
        return self.model.logits(hidden.index_select(0, rows))

    def _hidden(self, inputs: StepInputs) -> torch.Tensor:
        attention = PagedInputs(
            inputs.positions, inputs.slots, inputs.plans, self.rotary, self.buffers.attention.batch_invariant
        )
        return self.model(resolve_tokens(inputs.token_ids, self.last_tokens), self.cache, attention)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Launches the draws of the step that was executed last."""
        slots = self._inputs.draw_slots[: logits.shape[0]]
        inputs = SamplerInputs(
            self._inputs.draws, slots, self.last_tokens, self._changes, sequences_of(batch)
        )
        sampled = self._pooler.join(sample(logits, draws, inputs))

        def logits_of(rows: Int32Array) -> torch.Tensor:
            assert self._kept is not None
            return self._logits_of(self._kept, to_device(torch.from_numpy(rows), self.device))

        return score_prompts(sampled, batch, self.limits.max_num_seqs, logits_of, self.device)


def _attention_forms(
    model: Decoder, cache: KVCache, limits: SchedulerConfig, num_slots: int, batch_invariant: bool
) -> AttentionForms:
    config, data = model.config, cache.data
    target = target_of(data)
    assert target is not None
    group = config.num_heads // config.num_kv_heads
    capacity = scratch_capacity(num_slots, limits.max_num_seqs, limits.max_model_len, group)
    shape = (model.dtype, data.dtype, config.num_heads, config.num_kv_heads, config.head_dim)
    try:
        decode = form(target, "batch_invariant" if batch_invariant else "decode", *shape)
        prefill = decode if batch_invariant else form(target, "prefill", *shape)
    except ValueError as error:
        raise ConfigError(f"model: {error} fit an attention kernel; use --device cpu") from error
    return AttentionForms(
        decode=decode,
        prefill=prefill,
        group=group,
        capacity=capacity,
        scratch=make_scratch(capacity, config.num_kv_heads, config.head_dim, data.device),
    )
