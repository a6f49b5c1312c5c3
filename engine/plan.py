"""python -m engine.plan: what each rank of an engine takes and exchanges, before anything is loaded.

Reads a config.json or a GGUF file's header, no weights, and needs no GPU. The layers themselves, without data, say
how many bytes they store and what they exchange, so that the plan is what an engine with the same options prints when
it starts. An engine on a GPU then measures its activations, which are estimated here, and plans its cache anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.arguments import USAGE, add_engine_options
from engine.config import EngineConfig, SchedulerConfig, format_bytes, parse_bytes
from engine.errors import EngineError
from engine.executor.exchange_plan import plan_exchanges
from engine.executor.memory import MemoryPlan, available_bytes, plan_memory
from engine.executor.options import resolve_cache_dtype, resolve_device, resolve_dtype
from engine.kernels.launch import TARGETS
from engine.loading.checkpoint import open_checkpoint
from engine.loading.dummy import DummyCheckpoint
from engine.loading.file_kinds import is_gguf
from engine.loading.formats import stored_scheme
from engine.loading.resolve import resolve_configuration
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.modules import module_names
from engine.models.sharding import check_columns, check_shards, shard_of_config
from engine.parallel.group import TensorGroup, sums_integers
from engine.parallel.pipeline import Pipeline
from engine.parallel.shards import Shard
from engine.parallel.symmetric import check_device
from engine.quant.plan import QuantizationPlan
from engine.quant_spec import QuantSpec, SchemeSpec, parse_scheme_spec

LENGTHS = (1024, 4096, 8192, 32768, 131072)
"""Contexts whose concurrency is shown, besides the longest."""

ASSUMED_ARCH = "sm_90"
"""The chip that a GPU is taken to be of which only the memory is said."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What an engine takes.

    Attributes:
        config: Its options, "auto" resolved.
        dtype: Of activations.
        ranks: Each rank's memory, for the same number of blocks.
    """

    config: EngineConfig
    dtype: torch.dtype
    cache_dtype: torch.dtype
    limits: SchedulerConfig
    ranks: list[MemoryPlan]

    def concurrency(self, length: int) -> int:
        """Sequences of so many tokens that the cache holds."""
        first = self.ranks[0]
        return first.num_blocks // -(-length // first.block_size)

    def __str__(self) -> str:
        config, first = self.config, self.ranks[0]
        dtype, cache_dtype = (str(kind).removeprefix("torch.") for kind in (self.dtype, self.cache_dtype))
        lengths = [length for length in LENGTHS if length < first.max_model_len] + [first.max_model_len]
        fitting = ", ".join(f"{self.concurrency(length)} of {length}" for length in lengths)
        return "\n".join(
            [
                f"{config.model}: quant {config.quant}, dtype {dtype}, KV cache {cache_dtype}, "
                f"tensor parallel {config.tensor_parallel_size}, pipeline parallel {config.pipeline_parallel_size}",
                "exact: weights, KV cache and exchanged bytes; estimated: activations and CUDA graphs",
                "rank       weights   activations      KV cache",
                *(
                    f"{rank:>4}  {format_bytes(plan.weights):>12}  {format_bytes(plan.activations):>12}"
                    f"  {format_bytes(plan.kv_cache):>12}"
                    for rank, plan in enumerate(self.ranks)
                ),
                f"the cache holds {fitting} tokens; --max-num-seqs lets {self.limits.max_num_seqs} run at a time",
                *(
                    str(plan)
                    for rank, plan in enumerate(self.ranks)
                    if _differs(plan, self.ranks[rank - 1] if rank else None)
                ),
            ]
        )


def plan_engine(
    config: EngineConfig,
    settings: dict[str, Any],
    gpu_memory: int | None = None,
    auto_schemes: Callable[[Iterable[str]], dict[str, SchemeSpec]] | None = None,
) -> EnginePlan:
    """Plans every rank.

    Args:
        settings: The keys of config.json.
        gpu_memory: Bytes of each GPU; None for the device that is here.
        auto_schemes: What "auto" makes of modules; None: as the settings say.

    Raises:
        ConfigError: The model cannot be cut into so many shares or stages, or does not fit.
        CheckpointError: config.json describes what is not supported.
    """
    model_config = ModelConfig.from_dict(settings)
    config = _resolve_quantization(config, model_config, settings, auto_schemes)
    check_shards(model_config, config.tensor_parallel_size)
    if not config.exact_reduce:
        check_columns(model_config, config.quant_spec, config.tensor_parallel_size)
    if gpu_memory is None:
        device = resolve_device(config)
        # Whether ranks of a cluster share a machine is found out by themselves.
        num_local = 1 if config.distributed_executor_backend == "ray" else config.num_ranks
        available = available_bytes(config, device, num_local)
    else:
        device, available = torch.device("cuda"), int(gpu_memory * config.gpu_memory_utilization)
    if config.symmetric_memory:
        check_device(device)
    on_cpu = device.type == "cpu"
    dtype = resolve_dtype(config, settings, on_cpu)
    cache_dtype = resolve_cache_dtype(config, dtype, None if on_cpu else TARGETS[ASSUMED_ARCH])
    quantization = QuantizationPlan(config.quant_spec, dtype, config.deterministic)

    plans = []
    for rank in range(config.num_ranks):
        stage, index = divmod(rank, config.tensor_parallel_size)
        # Whether it is so on all ranks is found out by themselves.
        has_integer_sums = config.tensor_parallel_size > 1 and sums_integers(device)
        group = TensorGroup(
            Shard(index, config.tensor_parallel_size), None, config.exact_reduce, has_integer_sums
        )
        pipeline = Pipeline(stage, config.pipeline_parallel_size)
        model = Decoder(model_config, quantization, dtype, group, pipeline)
        shard = replace(shard_of_config(model_config, group.shard), num_layers=len(model.layers))
        plan = plan_memory(config, shard, model.num_bytes, cache_dtype, device, available)
        limits = SchedulerConfig.resolve(config, plan.max_model_len, device.type)
        plans.append(
            replace(plan, exchanges=plan_exchanges(model, limits, rank, device, config.symmetric_memory))
        )
    num_blocks = min(plan.num_blocks for plan in plans)
    plans = [plan.with_blocks(num_blocks) for plan in plans]
    limits = SchedulerConfig.resolve(config, plans[0].max_model_len, device.type)
    return EnginePlan(config, dtype, cache_dtype, limits, plans)


def _resolve_quantization(
    config: EngineConfig,
    model: ModelConfig,
    settings: dict[str, Any],
    auto_schemes: Callable[[Iterable[str]], dict[str, SchemeSpec]] | None,
) -> EngineConfig:
    """The options with what "auto" means for the model: here as its config.json says, and not its files."""
    modules = module_names(model)
    if config.quant != "auto":
        config.quant_spec.check(modules)
        return config
    if auto_schemes is not None:
        schemes = auto_schemes(modules)
        return replace(config, quant=str(QuantSpec.covering(schemes, modules)) if schemes else "none")
    found = {module: text for module in modules if (text := stored_scheme(settings, module)) is not None}
    stored = {module: parse_scheme_spec(text) for module, text in found.items() if text != "none"}
    return replace(config, quant=str(QuantSpec.covering(stored, modules)) if stored else "none")


def _differs(plan: MemoryPlan, other: MemoryPlan | None) -> bool:
    """Whether a rank's plan says more than the one before it."""

    def nameless(plan: MemoryPlan) -> MemoryPlan:
        return plan if plan.exchanges is None else replace(plan, exchanges=replace(plan.exchanges, rank=""))

    return other is None or nameless(plan) != nameless(other)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the plan. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.plan",
        usage=USAGE,
        description="Print what each rank of an engine takes and exchanges, without loading anything.",
    )
    parser.add_argument(
        "--gpu-memory", help="memory of each GPU, e.g. 80GiB; default: plan for the device that is here"
    )
    add_engine_options(parser)
    options = vars(parser.parse_args(arguments))
    gpu_memory = options.pop("gpu_memory")
    try:
        config = EngineConfig(**options)
        path = resolve_configuration(config.model)
        # Of a GGUF file the tensors' own types say what they run as.
        is_file = not path.is_dir() and is_gguf(path)
        checkpoint = open_checkpoint(path) if is_file else DummyCheckpoint(path)
        memory = None if gpu_memory is None else parse_bytes(gpu_memory)
        print(plan_engine(config, checkpoint.config, memory, checkpoint.auto_schemes if is_file else None))
    except EngineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
