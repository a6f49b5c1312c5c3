"""ModelRunner: what is on the device — weights, KV cache, and the executor that runs steps over them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import torch

from engine.config import EngineConfig, SchedulerConfig
from engine.core.batch import Batch, Draw
from engine.core.executor import Executor, Sampled
from engine.errors import ConfigError
from engine.executor.cpu_executor import CpuExecutor
from engine.executor.exchange_plan import plan_exchanges
from engine.executor.memory import MemoryPlan, available_bytes, plan_memory
from engine.executor.options import describe_cpu, resolve_cache_dtype, resolve_device, resolve_dtype
from engine.executor.step_meter import StepMeter, private_bytes
from engine.executor.torch_executor import TorchExecutor
from engine.kernels import cpu
from engine.kernels.attention.kv_layer import KVCache
from engine.kernels.launch import CompilationCounter, Target, target_of
from engine.loading.checkpoint import Checkpoint, stored_schemes
from engine.loading.model_config import read_model_config
from engine.loading.weights import checkpoint_key, load_weights
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.modules import module_names
from engine.models.rope import RotaryTable
from engine.models.sharding import check_columns, check_shards, shard_of_config
from engine.parallel.place import RankPlace, take_place
from engine.parallel.rendezvous import meet
from engine.parallel.symmetric import check_device
from engine.parallel.waiting import WaitRecord
from engine.quant.plan import QuantizationPlan
from engine.quant_spec import QuantSpec

if TYPE_CHECKING:
    from engine.executor.triton_executor import TritonExecutor

logger = logging.getLogger(__name__)


class ModelRunner:
    """Owns everything on the device.

    Args:
        rank, store: Among others, and where they meet; None for a single rank.
        attend: Calls what waits for other ranks.
        say: Takes what a rank has measured, in words.
        record: Says for whom this rank waits; a new one by default.

    Attributes:
        plan: How memory is used.
        cache_salt: What a cached block depends on besides its tokens: model, quantization, cache dtype.
        is_asynchronous: Whether calls return while the device still works.
        writer: The thread that writes the parsed weights into the cache; None where they come from there.
        compilations: Counts the kernels that were compiled after the start; there should be none.
    """

    def __init__(
        self,
        config: EngineConfig,
        checkpoint: Checkpoint,
        rank: int = 0,
        store: str | None = None,
        attend: Callable[[Callable[[], RankPlace]], RankPlace] = lambda wait: wait(),
        say: Callable[[str], None] = logger.info,
        record: WaitRecord | None = None,
    ) -> None:
        base_bytes = private_bytes()
        self.model_config = read_model_config(checkpoint)
        self.config = config = _resolve_quantization(config, self.model_config, checkpoint)
        self.device = resolve_device(config)
        check_shards(self.model_config, config.tensor_parallel_size)
        if not config.exact_reduce:
            check_columns(self.model_config, config.quant_spec, config.tensor_parallel_size)
        if config.symmetric_memory:
            check_device(self.device)
        if self.device.type == "cuda" and config.num_ranks > 1:
            self.device = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.place = attend(
            lambda: take_place(
                None if store is None else meet(store, config.num_ranks),
                rank,
                config.tensor_parallel_size,
                config.pipeline_parallel_size,
                self.device,
                config.exact_reduce,
                config.symmetric_memory,
                record,
            )
        )
        layers = self.place.pipeline.layers(self.model_config.num_layers)
        self.shard_config = replace(
            shard_of_config(self.model_config, self.place.group.shard), num_layers=len(layers)
        )
        self.is_asynchronous = self.device.type == "cuda"
        if self.device.type == "cpu":
            num_threads = config.num_threads or len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, num_threads // self.place.num_local))
        target = target_of(torch.empty(0, device=self.device))
        self.dtype = resolve_dtype(config, checkpoint.config, on_cpu=self.device.type == "cpu")
        self.cache_dtype = resolve_cache_dtype(config, self.dtype, target)
        runs_program = target is None and self.dtype == torch.float32 and cpu.library() is not None
        self.is_chunk_invariant = runs_program if target is None else config.batch_invariant_attention
        if target is None:
            bodies = describe_cpu(self.dtype)
            if config.deterministic and not runs_program:
                raise ConfigError(f"deterministic: on {bodies}")
            logger.info("on %d threads, %s", torch.get_num_threads(), bodies)
        quantization = QuantizationPlan(config.quant_spec, self.dtype, config.deterministic)
        self.model = Decoder(
            self.model_config, quantization, self.dtype, self.place.group, self.place.pipeline
        )
        self._weight_bytes = self.model.num_bytes
        self.plan = self._plan_memory(available_bytes(config, self.device, self.place.num_local))
        self.plan = self._agreed(self.plan)
        logger.info("%s", self.plan)
        name = f"{quantization.name}-{self.dtype}".replace("torch.", "") + self.place.name
        self.writer: Thread | None = None
        if config.load_format == "dummy":
            self.model.randomize(self.device)
            self.model.bind()
        else:
            cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
            self.writer = load_weights(self.model, checkpoint, name, cache_dir, self.device, runs_program)
        self.cache_salt = f"{checkpoint_key(checkpoint)}/{name}/{self.cache_dtype}".encode()
        self.rotary = {
            rope: RotaryTable(rope, self.model_config.head_dim, self.plan.max_model_len, self.device)
            for rope in set(self.model_config.ropes)
        }
        if target is None:
            self.cache = self._allocate_cache(self.plan.num_blocks + 1)
            self.executor: Executor = (
                CpuExecutor(self.model, self.cache, self.rotary, self._limits)
                if runs_program
                else TorchExecutor(self.model, self.cache, self.rotary, self._limits)
            )
        else:
            self.executor = self._make_device_executor(target)
        self.compilations = CompilationCounter(target)
        self._meter: StepMeter | None = None
        if self.plan.exchanges is not None and self.device.type == "cpu":
            self._meter = StepMeter(self.plan, self.place.group, self.place.pipeline, base_bytes, say)

    def execute(self, batch: Batch) -> torch.Tensor:
        """Runs the model over the batch and fills its slots of the cache: logits [rows that draw, vocabulary]."""
        logits = self.executor.execute(batch)
        if self._meter is not None:
            self._meter.note(batch.num_tokens, len(logits) + batch.num_scored_tokens)
        return logits

    def sample(self, logits: torch.Tensor, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Draws a token for each row of the batch that has a draw."""
        return self.executor.sample(logits, batch, draws)

    def progress(self) -> tuple[int, ...] | None:
        """What is another value when a step has got on meanwhile; None where that cannot be seen."""
        return cpu.progress() if isinstance(self.executor, CpuExecutor) else None

    @property
    def _limits(self) -> SchedulerConfig:
        return SchedulerConfig.resolve(self.config, self.plan.max_model_len, self.device.type)

    def _plan_memory(self, available: int, measured_activations: int | None = None) -> MemoryPlan:
        return plan_memory(
            self.config,
            self.shard_config,
            self._weight_bytes,
            self.cache_dtype,
            self.device,
            available,
            measured_activations,
        )

    def _agreed(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan with as many blocks as every rank has room for, and with what ranks exchange."""
        if self.place.size == 1:
            return plan
        plan = plan.with_blocks(self.place.smallest(plan.num_blocks, self.device))
        limits = SchedulerConfig.resolve(self.config, plan.max_model_len, self.device.type)
        return replace(
            plan,
            exchanges=plan_exchanges(
                self.model, limits, self.place.rank, self.device, self.config.symmetric_memory
            ),
        )

    def _make_device_executor(self, target: Target) -> TritonExecutor:
        """The executor, its kernels compiled and its graphs captured; fixes the plan and allocates the cache."""
        # Triton is imported only where it runs: a CPU's start does not wait for it.
        from engine.executor.triton_executor import TritonExecutor
        from engine.executor.warmup import GREEDY, dummy_batch, largest_batch, warm_up

        # At first over a cache of two blocks, since the largest step tells how many there can be.
        executor = TritonExecutor(
            self.model,
            self._allocate_cache(2),
            self.rotary,
            self._limits,
            self.plan.num_blocks * self.config.block_size,
            self.config.batch_invariant_attention,
        )
        if self.device.type == "cuda":
            warm_up(executor, target)
            activations = _measure_activations(executor, largest_batch(executor.limits))
            # What is free now is free of the weights and of all other things that stay.
            available = available_bytes(self.config, self.device) + self._weight_bytes
            plan = replace(self._plan_memory(available, activations), estimate=self.plan)
            self.plan = self._agreed(
                replace(plan, max_model_len=min(plan.max_model_len, self.plan.max_model_len))
            )
            logger.info("%s", self.plan)
        self.cache = executor.cache = self._allocate_cache(self.plan.num_blocks + 1)
        if self.device.type == "cuda" and self.config.captures_graphs:
            executor.capture_graphs(lambda size: dummy_batch([1] * size, GREEDY))
        return executor

    def _allocate_cache(self, num_blocks: int) -> KVCache:
        return KVCache.allocate(
            self.shard_config.num_layers,
            num_blocks,
            self.config.block_size,
            self.shard_config.num_kv_heads,
            self.shard_config.head_dim,
            self.cache_dtype,
            self.device,
        )


def _resolve_quantization(config: EngineConfig, model: ModelConfig, checkpoint: Checkpoint) -> EngineConfig:
    """The configuration with what "auto" means for the checkpoint.

    Raises:
        ConfigError: The checkpoint is quantized, and otherwise than asked for; or a pattern names no module.
    """
    modules = module_names(model)
    if config.quant == "auto":
        schemes = {} if config.load_format == "dummy" else checkpoint.auto_schemes(modules)
        return replace(config, quant=str(QuantSpec.covering(schemes, modules)) if schemes else "none")
    config.quant_spec.check(modules)
    stored = {} if config.load_format == "dummy" else stored_schemes(checkpoint, modules)
    for module, words in stored.items():
        wanted = config.quant_spec.of(module)
        if wanted.kind != "none" and wanted.storage != words.storage:
            raise ConfigError(
                f"quant: {module} in {checkpoint.path} is {words.storage} already, and cannot become "
                f"{wanted.storage}; leave --quant out, or give it {words.storage}"
            )
    return config


def _measure_activations(executor: TritonExecutor, batch: Batch) -> int:
    """Bytes that a step takes beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    executor.sample(executor.execute(batch), batch, [row.draw for row in batch.rows]).read()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    return peak - before
