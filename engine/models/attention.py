"""Attention over the paged cache as a layer: projections, rotary embedding, cache write, attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from engine.kernels.attention.dispatch import paged_attention
from engine.kernels.attention.kv_layer import KVLayer
from engine.kernels.attention.plan import AttentionPlan
from engine.kernels.operands import Activations, num_tokens
from engine.kernels.rotary import rotate_and_write
from engine.models.config import ModelConfig, RopeConfig
from engine.models.linear import Linear, build_linear
from engine.models.modules import ROLES
from engine.models.norm import RMSNorm
from engine.models.rope import RotaryTable
from engine.models.sharding import shard_of_config
from engine.parallel.group import TensorGroup
from engine.quant.plan import QuantizationPlan


@dataclass(frozen=True, slots=True)
class PagedInputs:
    """What the attention layers of a step share.

    Attributes:
        positions, slots: [T] int32, of each token, and where its key and value go in the cache.
        plans: By sliding window (None: none), which keys each sequence reads.
        rotary: By rope.
        batch_invariant: Whether chunks and decodes are computed in one form.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    plans: Mapping[int | None, AttentionPlan]
    rotary: dict[RopeConfig, RotaryTable]
    batch_invariant: bool


class Attention(nn.Module):
    """Grouped-query attention of one decoder layer.

    Args:
        prefix: The layer's name in a checkpoint, like "model.layers.0".
        layer: Its index.

    Attributes:
        qkv, output: Its projections, of `engine.models.modules`.
        rotate_and_write: The kernel; who needs one body of it on every machine puts that here.
    """

    qkv: Linear
    output: Linear

    def __init__(
        self,
        prefix: str,
        layer: int,
        config: ModelConfig,
        quantization: QuantizationPlan,
        dtype: torch.dtype,
        group: TensorGroup,
    ) -> None:
        super().__init__()
        mine = shard_of_config(config, group.shard)
        self.num_heads, self.num_kv_heads = mine.num_heads, mine.num_kv_heads
        self.head_dim, self.scale = config.head_dim, config.attention_scale
        self.window, self.rope = config.sliding_windows[layer], config.ropes[layer]
        for role in ROLES:
            if role.block == "attention":
                self.add_module(role.name, build_linear(role, prefix, config, quantization, group))
        self.rotate_and_write = rotate_and_write
        self.query_norm = self.key_norm = None
        if config.has_query_key_norm:
            norm = (self.head_dim, config.norm_epsilon, config.norm_offset, dtype)
            self.query_norm = RMSNorm(f"{prefix}.self_attn.q_norm", *norm)
            self.key_norm = RMSNorm(f"{prefix}.self_attn.k_norm", *norm)

    def forward(self, x: Activations, cache: KVLayer, inputs: PagedInputs) -> torch.Tensor:
        """x [T, hidden] → [T, hidden]; the step's keys and values are written to the cache."""
        table = inputs.rotary[self.rope]
        queries = self.rotate_and_write(
            self.qkv(x).view(num_tokens(x), -1, self.head_dim),
            inputs.positions,
            table.cosine,
            table.sine,
            cache,
            inputs.slots,
            self.num_kv_heads,
            None if self.query_norm is None else self.query_norm.weight,
            None if self.key_norm is None else self.key_norm.weight,
            0.0 if self.query_norm is None else self.query_norm.epsilon,
        )
        attended = paged_attention(
            queries,
            cache,
            inputs.plans[self.window],
            self.scale,
            self.window,
            batch_invariant=inputs.batch_invariant,
        )
        return self.output(attended)
