"""ModelRunner: what is on the device — weights, KV cache, and the executor that runs steps over them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Protocol

import torch

from engine.batch import Batch, Draw
from engine.config import EngineConfig, SchedulerConfig
from engine.errors import ConfigError
from engine.host_executor import HostExecutor, Sampled
from engine.kernels.kv_layer import KVCache
from engine.layers.rope import RotaryTable
from engine.loading.checkpoint import Checkpoint
from engine.loading.model import checkpoint_key, load_weights
from engine.memory import MemoryPlan, plan_memory
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.quant import plan_quantization

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_TYPES = DTYPES | {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}


class Executor(Protocol):
    """Runs steps. `execute` and `sample` are two calls, so that a step's tokens may be known only between them."""

    def execute(self, batch: Batch) -> torch.Tensor:
        """Runs the model: logits [rows that draw, vocabulary] float32."""
        ...

    def sample(self, logits: torch.Tensor, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Draws a token for each row that has a draw."""
        ...


class ModelRunner:
    """Owns everything on the device.

    Attributes:
        plan: How memory is used.
        cache_salt: What a cached block depends on besides its tokens: model, quantization, cache dtype.
        is_asynchronous: Whether calls return while the device still works.
    """

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint) -> None:
        self.device = _resolve_device(config)
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
        self.dtype = _resolve_dtype(config, checkpoint, self.device)
        cache_dtype = CACHE_TYPES.get(config.kv_cache_dtype, self.dtype)
        ties = checkpoint.config.get("tie_word_embeddings") or "lm_head.weight" not in checkpoint.names()
        self.model_config = ModelConfig.from_dict({**checkpoint.config, "tie_word_embeddings": ties})
        quantization = plan_quantization(config.quant, self.dtype, config.group_size)
        self.model = Decoder(self.model_config, quantization, self.dtype)
        self.plan: MemoryPlan = plan_memory(
            config, self.model_config, self.model.num_bytes, cache_dtype, self.device
        )
        logger.info("%s", self.plan)
        name = f"{quantization.name}-{self.dtype}".replace("torch.", "")
        if config.load_format == "dummy":
            self.model.randomize(self.device)
            self.model.bind()
        else:
            cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
            load_weights(self.model, checkpoint, name, cache_dir, self.device)
        self.cache_salt = f"{checkpoint_key(checkpoint)}/{name}/{cache_dtype}".encode()
        self.cache = KVCache.allocate(
            self.model_config.num_layers,
            self.plan.num_blocks + 1,
            config.block_size,
            self.model_config.num_kv_heads,
            self.model_config.head_dim,
            cache_dtype,
            self.device,
        )
        rotary = {
            rope: RotaryTable(rope, self.model_config.head_dim, self.plan.max_model_len, self.device)
            for rope in set(self.model_config.ropes)
        }
        limits = SchedulerConfig.resolve(config, self.plan.max_model_len, self.device.type)
        self.executor: Executor = HostExecutor(self.model, self.cache, rotary, limits.max_num_seqs)
        self.is_asynchronous = self.device.type == "cuda"

    def execute(self, batch: Batch) -> torch.Tensor:
        """Runs the model over the batch and fills its slots of the cache: logits [rows that draw, vocabulary]."""
        return self.executor.execute(batch)

    def sample(self, logits: torch.Tensor, batch: Batch, draws: list[Draw | None]) -> Sampled:
        """Draws a token for each row of the batch that has a draw."""
        return self.executor.sample(logits, batch, draws)


def _resolve_device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch finds no GPU; use --device cpu")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def _resolve_dtype(config: EngineConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    if device.type == "cpu":
        return torch.float32
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16"
    # float32 checkpoints run in bf16 on a GPU: few are meant to be served in full precision.
    return DTYPES[name] if name in ("bfloat16", "float16") else torch.bfloat16
