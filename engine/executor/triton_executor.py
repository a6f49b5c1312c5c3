"""TritonExecutor: runs steps on a GPU, or wherever Triton's kernels run, without waiting for them.

one copy of a step's inputs ─► block tables ─► forward pass (a CUDA graph for decodes) ─► logits
adjustments, if any ─► draw ─► last tokens, which the next step reads on the device ─► copy to the host
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from engine.config import SchedulerConfig
from engine.core.batch import Batch, Draw
from engine.core.executor import Drawn, Sampled
from engine.core.request import RowFailure, SampledToken
from engine.errors import ConfigError
from engine.executor.cuda_graphs import CudaGraphs, graph_sizes
from engine.executor.sampler import adjustments_of, has_filters
from engine.executor.step_buffers import AttentionForms, StepBuffers, StepInputs
from engine.kernels.attention.in_triton import form, make_scratch, scratch_capacity
from engine.kernels.attention.kv_layer import KVCache
from engine.kernels.launch import target_of
from engine.kernels.sample import Adjustments, Logprobs, adjust_logits, draw, logprobs_of
from engine.kernels.step import resolve_tokens, update_tables
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
        is_decode = num_draws > 0 and all(len(row.token_ids) == 1 for row in batch.rows)
        size = self.graphs.size_for(len(batch.rows)) if self.graphs is not None and is_decode else None
        inputs = self._inputs = self._write(batch, size)
        if num_draws == 0:
            self._hidden(inputs)
            return torch.empty(0, self.model.config.vocab_size, device=self.device)
        if self.graphs is not None and inputs.padded_size is not None:
            logits = self.graphs.replay(inputs.padded_size)
            if num_draws == len(batch.rows):
                return logits[:num_draws]
            return logits.index_select(0, inputs.last_rows[:num_draws])
        return self._forward(inputs, inputs.last_rows[:num_draws])

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

    def _forward(self, inputs: StepInputs, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of these rows of the flat batch, [n] int32; None for all."""
        hidden = self._hidden(inputs)
        return self.model.logits(hidden if rows is None else hidden.index_select(0, rows))

    def _hidden(self, inputs: StepInputs) -> torch.Tensor:
        attention = PagedInputs(
            inputs.positions, inputs.slots, inputs.plans, self.rotary, self.buffers.attention.batch_invariant
        )
        return self.model(resolve_tokens(inputs.token_ids, self.last_tokens), self.cache, attention)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Launches the draws of the step that was executed last."""
        wanted = [how for how in draws if how is not None]
        if not wanted:
            return Drawn([None] * len(draws))
        asking = [row for row, how in enumerate(wanted) if how.params.logprobs is not None]
        index = self._to_device(torch.tensor(asking, dtype=torch.int64)) if asking else None
        raw = None if index is None else logits.index_select(0, index)
        adjustments = adjustments_of(wanted)
        if adjustments is not None:
            entries = (self._to_device(getattr(adjustments, name)) for name in Adjustments.__slots__)
            adjust_logits(logits, Adjustments(*entries))
        slots = self._inputs.draw_slots[: len(wanted)]
        tokens = draw(
            logits,
            self._inputs.draws,
            filters=any(has_filters(how) for how in wanted),
            last_tokens=self.last_tokens,
            table_rows=slots,
        )
        logprobs = None
        if raw is not None and index is not None:
            num = max(wanted[row].params.logprobs or 0 for row in asking)
            logprobs = logprobs_of(raw, tokens.index_select(0, index), num)
        return DeviceSampled.start(draws, tokens, asking, logprobs)

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class DeviceSampled:
    """Tokens on their way to the host.

    Attributes:
        draws: One a row of the batch.
        tokens: [draws] int32, -1 where the logits were not finite.
        asking: The draws that want log-probabilities.
        arrived: Recorded after the copies; None where they are no matter of time.
    """

    draws: list[Draw | None]
    tokens: torch.Tensor
    asking: list[int]
    logprobs: Logprobs | None
    arrived: torch.cuda.Event | None

    @staticmethod
    def start(
        draws: list[Draw | None], tokens: torch.Tensor, asking: list[int], logprobs: Logprobs | None
    ) -> DeviceSampled:
        """Starts the copies to the host."""
        if logprobs is not None:
            logprobs = Logprobs(*(_to_host(getattr(logprobs, name)) for name in Logprobs.__slots__))
        tokens_on_host = _to_host(tokens)
        arrived = None
        if tokens.device.type == "cuda":
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return DeviceSampled(draws, tokens_on_host, asking, logprobs, arrived)

    def read(self) -> list[SampledToken | RowFailure | None]:
        """Waits for the tokens: the one synchronization of a step."""
        if self.arrived is not None:
            self.arrived.synchronize()
        token_ids = iter(self.tokens.tolist())
        places = iter(range(len(self.asking)))
        return [None if how is None else self._token(how, next(token_ids), places) for how in self.draws]

    def _token(self, how: Draw, token_id: int, places: Iterator[int]) -> SampledToken | RowFailure:
        """One draw's result; `places` counts the rows of the log-probabilities."""
        index = None if how.params.logprobs is None else next(places)
        if token_id < 0:
            return RowFailure("the model's logits are not finite (NaN or infinity)")
        if index is None or self.logprobs is None:
            return SampledToken(token_id)
        ids = self.logprobs.top_ids[index, : how.params.logprobs].tolist()
        values = self.logprobs.top_values[index, : how.params.logprobs].tolist()
        return SampledToken(
            token_id,
            logprob=float(self.logprobs.chosen[index]),
            rank=int(self.logprobs.ranks[index]),
            top_logprobs=list(zip(ids, values, strict=True)),
        )


def _to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy in memory that the device writes to by itself."""
    if x.device.type != "cuda":
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


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
