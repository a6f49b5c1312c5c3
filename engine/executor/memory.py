"""The memory plan: what weights, activations and KV cache take, decided before anything large is allocated."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.config import EngineConfig, SchedulerConfig, format_bytes, parse_bytes
from engine.errors import ConfigError
from engine.executor.exchange_plan import ExchangePlan
from engine.kernels import cpu
from engine.kernels.attention.in_c import SEGMENT
from engine.kernels.attention.kv_layer import INT4, INT4_MULTIPLE, block_bytes
from engine.models.config import ModelConfig
from engine.models.modules import split_inputs, split_outputs

logger = logging.getLogger(__name__)


SAMPLER_BYTES = 160
"""Bytes for each token of the vocabulary that drawing a row's token on a CPU takes: 37 at a time (top_p with
penalties and log-probabilities), and up to 120 more in the holes that they leave in glibc's heap among what lives
longer."""

DEFAULT_CPU_CACHE_SHARE = 0.25
DEFAULT_CPU_CACHE_LIMIT = 4 * 2**30


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How an engine uses its device's memory, in bytes unless named otherwise.

    Attributes:
        activations: Peak of one step, logits and the sampler's buffers included.
        is_measured: Whether `activations` was measured, by a forward pass of the largest step; else estimated.
        graphs: Estimate for the CUDA graphs' own memory; 0 without graphs.
        num_blocks: Blocks that sequences can use; one more is kept as the null block.
        max_model_len: Longest sequence in tokens: the model's, or what the cache can hold.
        estimate: The plan that this one corrects by a measurement.
        exchanges: With other ranks; None for a single one.
    """

    device: str
    available: int
    weights: int
    activations: int
    is_measured: bool
    graphs: int
    block: int
    block_size: int
    num_blocks: int
    max_model_len: int
    requested_max_len: int
    estimate: MemoryPlan | None = None
    exchanges: ExchangePlan | None = None

    @property
    def kv_cache(self) -> int:
        return (self.num_blocks + 1) * self.block

    def with_blocks(self, num_blocks: int) -> MemoryPlan:
        """The plan with fewer blocks, as many as each of an engine's ranks has."""
        return replace(
            self,
            num_blocks=num_blocks,
            max_model_len=min(self.max_model_len, num_blocks * self.block_size),
        )

    def __str__(self) -> str:
        tokens = self.num_blocks * self.block_size
        lines = [
            *([str(self.estimate)] if self.estimate else []),
            f"memory plan ({self.device}, {format_bytes(self.available)} available)",
            f"  weights      {format_bytes(self.weights):>12}",
            f"  activations  {format_bytes(self.activations):>12}"
            f"  {'measured' if self.is_measured else 'estimated'} peak of a step",
            *([f"  CUDA graphs  {format_bytes(self.graphs):>12}  estimated"] if self.graphs else []),
            f"  KV cache     {format_bytes(self.kv_cache):>12}  {self.num_blocks} blocks of {self.block_size}"
            f" = {tokens} tokens, {format_bytes(self.block // self.block_size)} each",
            f"  max_model_len {self.max_model_len:>11}  tokens; {tokens / self.max_model_len:.1f} such sequences"
            f" fit; at most {self.block_size - 1} slots wasted in each",
        ]
        if self.max_model_len < self.requested_max_len:
            lines.append(
                f"  max_model_len was {self.requested_max_len}: the KV cache holds {tokens} tokens;"
                " raise --kv-cache-memory for more"
            )
        if self.exchanges is not None:
            lines.append(str(self.exchanges))
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Division:
    """How memory is divided if the longest sequence has so many tokens; bytes.

    Attributes:
        room: What weights, activations and graphs leave.
        kv_cache: What the cache gets of it, if it fits.
    """

    scheduler: SchedulerConfig
    activations: int
    graphs: int
    room: int
    kv_cache: int


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    weight_bytes: int,
    cache_dtype: torch.dtype,
    device: torch.device,
    available: int,
    measured_activations: int | None = None,
) -> MemoryPlan:
    """Divides the device's memory.

    Args:
        available: Bytes that the engine may use, weights included.
        measured_activations: Peak of the largest step, in bytes, once it is known.

    Raises:
        ConfigError: It does not fit; the message shows the arithmetic.
    """
    requested = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    if config.max_model_len is not None and config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len ({config.max_model_len}) exceeds the model's context of "
            f"{model.max_position_embeddings} tokens"
        )
    if cache_dtype == INT4 and model.head_dim % INT4_MULTIPLE:
        raise ConfigError(
            f"kv_cache_dtype: int4 needs heads of a multiple of {INT4_MULTIPLE} elements, this model's have "
            f"{model.head_dim}; use int8"
        )
    block = block_bytes(model.num_layers, config.block_size, model.num_kv_heads, model.head_dim, cache_dtype)

    def divide(max_model_len: int) -> _Division:
        scheduler = SchedulerConfig.resolve(config, max_model_len, device.type)
        estimate = _cpu_activation_bytes if device.type == "cpu" else _device_activation_bytes
        activations = estimate(model, scheduler) if measured_activations is None else measured_activations
        if measured_activations is None and config.tensor_parallel_size > 1 and config.exact_reduce:
            activations += _gathered_bytes(config, model, scheduler)
        graphs = 0
        if device.type == "cuda" and config.captures_graphs:
            decodes = replace(scheduler, max_num_batched_tokens=scheduler.max_num_seqs)
            graphs = _device_activation_bytes(model, decodes)
        room = available - weight_bytes - activations - graphs
        if config.kv_cache_memory is not None:
            kv_cache = parse_bytes(config.kv_cache_memory)
        elif device.type == "cpu":
            kv_cache = min(int(DEFAULT_CPU_CACHE_SHARE * max(room, 0)), DEFAULT_CPU_CACHE_LIMIT)
        else:
            kv_cache = room
        return _Division(scheduler, activations, graphs, room, kv_cache)

    def holds(max_model_len: int) -> bool:
        division = divide(max_model_len)
        num_tokens = (min(division.kv_cache, division.room) // block - 1) * config.block_size
        return num_tokens >= max_model_len

    # Tables and partial sums grow with the longest sequence: those of one that the cache can hold are planned.
    length = requested
    if not holds(requested):
        low, high = 1, requested
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        length = low
    division = divide(length)
    scheduler, activations, graphs = division.scheduler, division.activations, division.graphs
    room, kv_cache = division.room, division.kv_cache
    # More than every sequence at full length is never used.
    useful_blocks = scheduler.max_num_seqs * -(-requested // config.block_size)
    num_blocks = min(kv_cache // block - 1, useful_blocks)
    arithmetic = (
        f"{format_bytes(available)} available - {format_bytes(weight_bytes)} weights"
        f" - {format_bytes(activations)} activations"
        f"{f' - {format_bytes(graphs)} CUDA graphs' if graphs else ''} leave {format_bytes(max(room, 0))}"
    )
    if num_blocks < 1:
        raise ConfigError(
            f"kv_cache_memory: {format_bytes(max(kv_cache, 0))} hold less than the two blocks of "
            f"{format_bytes(block)} that a cache needs ({arithmetic})"
        )
    if (num_blocks + 1) * block > room:
        raise ConfigError(
            f"kv_cache_memory: {format_bytes(kv_cache)} do not fit: {arithmetic}; lower --kv-cache-memory"
        )
    return MemoryPlan(
        device=str(device),
        available=available,
        weights=weight_bytes,
        activations=activations,
        is_measured=measured_activations is not None,
        graphs=graphs,
        block=block,
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_model_len=min(length, num_blocks * config.block_size),
        requested_max_len=requested,
    )


def _cpu_activation_bytes(model: ModelConfig, scheduler: SchedulerConfig) -> int:
    """What a step on a CPU works in: floats, the int8 codes of what is multiplied, and the logits with a copy."""
    floats = 4 * (4 * model.hidden_size + split_outputs(model) + split_inputs(model))
    # A code takes one byte, and the place of a second term two.
    codes = 3 * (model.hidden_size + split_inputs(model))
    logits = 2 * 4 * scheduler.max_num_seqs * model.vocab_size
    # A share of the output for each segment of each sequence that decodes.
    segments = scheduler.max_num_seqs * -(-scheduler.max_model_len // SEGMENT)
    partials = 4 * segments * model.num_heads * (model.head_dim + 2)
    masks = 0
    if cpu.library() is None:
        # torch's attention: the mask of a prompt that has a step to itself, and for each query head of a key head.
        group = model.num_heads // model.num_kv_heads
        masks = 4 * scheduler.max_num_batched_tokens * scheduler.max_model_len * (group + 2)
    sampler = SAMPLER_BYTES * model.vocab_size
    rotary = _rotary_bytes(model, scheduler)
    return scheduler.max_num_batched_tokens * (floats + codes) + logits + partials + masks + sampler + rotary


def _device_activation_bytes(model: ModelConfig, scheduler: SchedulerConfig) -> int:
    """Peak of a step on a GPU: 16-bit activations with what the next product takes, and float32 logits.

    The logits are there as the product's output, as float32 and, where log-probabilities are asked for, once more;
    the sampler's buffers are a small part of that.
    """
    width = 2 * (6 * model.hidden_size + 2 * split_outputs(model))
    logits = scheduler.max_num_seqs * model.vocab_size * (2 + 4 + 4)
    return scheduler.max_num_batched_tokens * width + logits + _rotary_bytes(model, scheduler)


def _rotary_bytes(model: ModelConfig, scheduler: SchedulerConfig) -> int:
    """The tables of rotary embeddings, which are as long as the longest sequence."""
    return len(set(model.ropes)) * scheduler.max_model_len * model.head_dim * 4


def _gathered_bytes(config: EngineConfig, model: ModelConfig, scheduler: SchedulerConfig) -> int:
    """What ranks put together, as it comes from each and side by side, of 32 bits a number."""
    width = split_inputs(model) * config.tensor_parallel_size + model.hidden_size
    return 2 * 4 * (scheduler.max_num_batched_tokens * width + scheduler.max_num_seqs * model.vocab_size)


def available_bytes(config: EngineConfig, device: torch.device, num_local: int = 1) -> int:
    """Bytes of the device's memory that a rank may use; main memory is shared by the ranks of a machine."""
    if device.type == "cpu":
        return available_memory() // num_local
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1.0 - config.gpu_memory_utilization) * total)


def available_memory() -> int:
    """Bytes of main memory that programs can get without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
