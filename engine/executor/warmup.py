"""Steps that nobody asked for: they compile every kernel before the first request, and show what a step takes.

The same steps on the meta device, under `recording`, say which launches an engine can make on a chip that is not
there: what `python -m engine.kernels.compile` compiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import torch
from tqdm import tqdm

from engine.config import EngineConfig, SchedulerConfig
from engine.core.batch import Batch, BatchRow, Draw, Pool, Pooling, Scoring
from engine.core.kv_cache import NULL_BLOCK
from engine.core.limits import MAX_LOGPROBS
from engine.core.sampling_params import EXAMPLES, SamplingParams
from engine.executor.options import resolve_cache_dtype, resolve_dtype
from engine.executor.triton_executor import TritonExecutor
from engine.kernels.attention.kv_layer import KVCache
from engine.kernels.launch import TARGETS, Launch, Target, recording, token_classes
from engine.loading.dummy import DummyCheckpoint
from engine.loading.resolve import resolve_model
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.rope import RotaryTable
from engine.parallel.group import TensorGroup
from engine.parallel.pipeline import Pipeline
from engine.quant.plan import QuantizationPlan

GREEDY = SamplingParams(temperature=0)
FULL = SamplingParams(temperature=0.7, logprobs=MAX_LOGPROBS, prompt_logprobs=MAX_LOGPROBS, **EXAMPLES)
"""Everything that a draw may need."""

NUM_META_SLOTS = 2**20
"""Tokens of a cache that is not there: of a size that GPUs hold, which only decides that it is larger than 2 GiB."""

DUMMY = -2
"""The admission of rows that belong to no sequence."""


def warm_up_batches(limits: SchedulerConfig, target: Target) -> Iterator[Batch]:
    """Batches that between them launch every kernel in every tile: decodes and prompts of every class of size."""
    for num_rows in token_classes(target, limits.max_num_seqs):
        for params in (GREEDY, FULL):
            yield dummy_batch([1] * num_rows, params)
    for num_tokens in token_classes(target, limits.max_num_batched_tokens):
        yield dummy_batch(_prompt_lengths(num_tokens, limits), GREEDY)
    for pooling in get_args(Pooling):
        (row,) = dummy_batch([1], GREEDY).rows
        yield Batch([replace(row, draw=None, pool=Pool(pooling, is_complete=True))])


def largest_batch(limits: SchedulerConfig) -> Batch:
    """A step that takes as much memory as any: all tokens, and as many rows as go, with draws of every kind."""
    num_rows = limits.max_num_seqs
    share, rest = divmod(limits.max_num_batched_tokens, num_rows)
    lengths = [min(share + (row < rest), limits.max_model_len) for row in range(num_rows)]
    return dummy_batch(lengths, FULL)


def dummy_batch(lengths: list[int], params: SamplingParams) -> Batch:
    """Rows of so many tokens that read and write nothing but the null block."""
    draw = Draw(params, seed=0, index=0, position=0, prompt_token_ids=(0,), output_token_ids=(1,))
    num_top = params.prompt_logprobs
    return Batch(
        [
            BatchRow(
                [0] * length,
                0,
                0,
                block_table=[NULL_BLOCK],
                draw=draw,
                slot=slot,
                admission=DUMMY,
                scoring=None if num_top is None else Scoring(1, 0, [0] * length, num_top),
            )
            for slot, length in enumerate(lengths)
        ]
    )


def _prompt_lengths(num_tokens: int, limits: SchedulerConfig) -> list[int]:
    """So many tokens, or what the sequences' number and length allow, in few rows."""
    longest = min(limits.max_model_len, num_tokens)
    num_rows = min(-(-num_tokens // longest), limits.max_num_seqs)
    return [min(longest, num_tokens - row * longest) for row in range(num_rows)]


def warm_up(executor: TritonExecutor, target: Target) -> None:
    """Runs the batches; kernels that Triton's cache on disk has are loaded, the others compiled."""
    batches = list(warm_up_batches(executor.limits, target))
    for batch in tqdm(batches, desc="Compiling kernels", unit="step", leave=False):
        sampled = executor.sample(executor.execute(batch), batch, _draws(batch, executor))
        if executor.device.type != "meta":
            sampled.read()


def _draws(batch: Batch, executor: TritonExecutor) -> list[Draw | None]:
    """The batch's draws; those that need everything have a bitmask, too."""
    mask = b"\xff" * (4 * -(-executor.model.config.vocab_size // 32))
    draws = [row.draw for row in batch.rows]
    return [replace(draw, allowed_tokens=mask) if draw and draw.params is FULL else draw for draw in draws]


def make_meta_executor(config: EngineConfig, target: Target) -> TritonExecutor:
    """An executor of the configured model without data, for use under `recording`.

    Raises:
        ConfigError, ModelNotFoundError, CheckpointError: As when an engine starts.
    """
    device = torch.device("meta")
    checkpoint = DummyCheckpoint(resolve_model(config.model))
    model_config = ModelConfig.from_dict(checkpoint.config)
    dtype = resolve_dtype(config, checkpoint.config, on_cpu=False)
    cache_dtype = resolve_cache_dtype(config, dtype, target)
    context = min(
        config.max_model_len or model_config.max_position_embeddings, model_config.max_position_embeddings
    )
    limits = SchedulerConfig.resolve(config, context, "cuda")
    model = Decoder(
        model_config,
        QuantizationPlan(config.quant_spec, dtype, config.deterministic),
        dtype,
        TensorGroup(),
        Pipeline(),
    )
    model.bind()
    cache = KVCache.allocate(
        model_config.num_layers,
        NUM_META_SLOTS // config.block_size,
        config.block_size,
        model_config.num_kv_heads,
        model_config.head_dim,
        cache_dtype,
        device,
    )
    rotary = {
        rope: RotaryTable(rope, model_config.head_dim, context, device) for rope in set(model_config.ropes)
    }
    return TritonExecutor(model, cache, rotary, limits, NUM_META_SLOTS, config.batch_invariant_attention)


def record_launches(config: EngineConfig, arch: str) -> set[Launch]:
    """Every launch that an engine of this configuration can make on a chip, from the engine's own code.

    Args:
        arch: A key of `TARGETS`.
    """
    target = TARGETS[arch]
    with recording(target) as launches:
        warm_up(make_meta_executor(config, target), target)
    return launches
