"""ModelRunner: turns a step's batch into tensors, runs the model, draws the tokens."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from engine.batch import Batch
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernels.attention import plan_attention, slot_mapping
from engine.layers.attention import AttentionInputs
from engine.layers.rope import RotaryTable
from engine.loading.checkpoint import Checkpoint
from engine.loading.model import checkpoint_key, load_weights
from engine.memory import MemoryPlan, plan_memory
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.quant import plan_quantization
from engine.request import RowFailure, SampledToken
from engine.sampling.sampler import sample

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelRunner:
    """Owns the model, its KV cache and everything else on the device.

    Attributes:
        plan: How memory is used.
        cache_salt: What a cached block depends on besides its tokens: model, quantization, cache dtype.
    """

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint) -> None:
        self.device = _resolve_device(config)
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
        self.dtype = _resolve_dtype(config, checkpoint, self.device)
        cache_dtype = DTYPES.get(config.kv_cache_dtype, self.dtype)
        ties = checkpoint.config.get("tie_word_embeddings") or "lm_head.weight" not in checkpoint.names()
        self.model_config = ModelConfig.from_dict({**checkpoint.config, "tie_word_embeddings": ties})
        quantization = plan_quantization(config.quant, self.dtype, config.group_size)
        self.model = Decoder(self.model_config, quantization, self.dtype)
        self.plan: MemoryPlan = plan_memory(
            config, self.model_config, self.model.num_bytes, cache_dtype, self.device
        )
        logger.info("%s", self.plan)
        name = f"{quantization.name}-{self.dtype}".replace("torch.", "")
        cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
        load_weights(self.model, checkpoint, name, cache_dir, self.device)
        self.cache_salt = f"{checkpoint_key(checkpoint)}/{name}/{cache_dtype}".encode()
        self.block_size = config.block_size
        # Not zeroed: no slot is read before it is written, and memory that nobody uses is never touched.
        self.caches = torch.empty(
            self.model_config.num_layers,
            2,
            self.plan.num_blocks + 1,
            config.block_size,
            self.model_config.num_kv_heads,
            self.model_config.head_dim,
            dtype=cache_dtype,
            device=self.device,
        )
        self.rotary = {
            rope: RotaryTable(rope, self.model_config.head_dim, self.plan.max_model_len, self.device)
            for rope in set(self.model_config.ropes)
        }

    @torch.inference_mode()
    def execute(self, batch: Batch) -> torch.Tensor:
        """Runs the model over the batch and fills its slots of the cache.

        Returns:
            [rows that draw, hidden]: the hidden states that `sample` needs.
        """
        rows, device = batch.rows, self.device
        token_ids = torch.tensor([token for row in rows for token in row.token_ids], device=device)
        positions = torch.tensor(
            [row.start + i for row in rows for i in range(len(row.token_ids))], device=device
        )
        inputs = AttentionInputs(
            slots=slot_mapping(rows, self.block_size, device),
            plans={
                window: plan_attention(rows, self.caches[0], window, self.dtype)
                for window in set(self.model_config.sliding_windows)
            },
            rotary={rope: table.at(positions, self.dtype) for rope, table in self.rotary.items()},
        )
        hidden = self.model(token_ids, self.caches, inputs)
        last = []
        end = 0
        for row in rows:
            end += len(row.token_ids)
            if row.draw is not None:
                last.append(end - 1)
        return hidden.index_select(0, torch.tensor(last, dtype=torch.int64, device=device))

    @torch.inference_mode()
    def sample(self, hidden: torch.Tensor, batch: Batch) -> list[SampledToken | RowFailure | None]:
        """One entry a row of the batch: its next token, or None where its prompt is not through."""
        draws = [row.draw for row in batch.rows if row.draw is not None]
        tokens = iter(sample(self.model.logits(hidden), draws) if draws else [])
        return [None if row.draw is None else next(tokens) for row in batch.rows]


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
