"""Attention over the paged cache as a layer: projections, rotary embedding, cache write, attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.kernels.attention import AttentionPlan, paged_attention, rotate_and_write
from engine.kernels.kv_layer import KVLayer
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.models.config import ModelConfig, RopeConfig
from engine.quant import QuantizationPlan


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What the attention layers of a step share.

    Attributes:
        slots: [T] int64, where each token's key and value go in the cache.
        plans: By sliding window (None: none), which keys each sequence reads.
        rotary: By rope, cosine and sine of each token's position, [T, 1, head_dim] each.
    """

    slots: torch.Tensor
    plans: dict[int | None, AttentionPlan]
    rotary: dict[RopeConfig, tuple[torch.Tensor, torch.Tensor]]


class Attention(nn.Module):
    """Grouped-query attention of one decoder layer."""

    def __init__(
        self, prefix: str, layer: int, config: ModelConfig, quantization: QuantizationPlan, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.scale = config.head_dim, config.attention_scale
        self.window, self.rope = config.sliding_windows[layer], config.ropes[layer]
        query_size, key_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv = Linear(
            [f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"],
            config.hidden_size,
            [query_size, key_size, key_size],
            quantization.linear,
            config.has_qkv_bias,
        )
        self.output = Linear(
            [f"{prefix}.o_proj"],
            query_size,
            [config.hidden_size],
            quantization.linear,
            config.has_output_bias,
        )
        self.query_norm = self.key_norm = None
        if config.has_query_key_norm:
            norm = (self.head_dim, config.norm_epsilon, config.norm_offset, dtype)
            self.query_norm = RMSNorm(f"{prefix}.q_norm", *norm)
            self.key_norm = RMSNorm(f"{prefix}.k_norm", *norm)

    def forward(self, x: torch.Tensor, cache: KVLayer, inputs: AttentionInputs) -> torch.Tensor:
        """x [T, hidden] → [T, hidden]; the step's keys and values are written to the cache."""
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys, values = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
            heads = torch.cat((self.query_norm(queries), self.key_norm(keys), values), dim=1)
        queries = rotate_and_write(heads, *inputs.rotary[self.rope], cache, inputs.slots, self.num_kv_heads)
        return self.output(paged_attention(queries, cache, inputs.plans[self.window], self.scale))
