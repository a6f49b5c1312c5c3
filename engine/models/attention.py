"""Attention over the paged cache as a layer: projections, rotary embedding, cache write, attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.kernels import rotary
from engine.kernels.attention import in_torch as attention
from engine.kernels.attention import paged as paged_attention
from engine.kernels.attention.in_c import CpuPlan
from engine.kernels.attention.in_torch import RowPlan
from engine.kernels.attention.kv_layer import KVLayer
from engine.kernels.attention.paged import PagedPlan
from engine.kernels.operands import Activations, num_tokens
from engine.models.config import ModelConfig, RopeConfig
from engine.models.linear import Linear
from engine.models.norm import RMSNorm
from engine.models.rope import RotaryTable
from engine.models.sharding import shard_of_config
from engine.models.splits import ColumnParallel, row_parallel
from engine.parallel.group import TensorGroup
from engine.quant.plan import QuantizationPlan


@dataclass(frozen=True, slots=True)
class TorchInputs:
    """What the attention layers of a step share where torch's operators run it.

    Attributes:
        slots: [T] int64, where each token's key and value go in the cache.
        plans: By sliding window (None: none), which keys each sequence reads.
        rotary: By rope, cosine and sine of each token's position, [T, 1, head_dim] each.
    """

    slots: torch.Tensor
    plans: dict[int | None, list[RowPlan]]
    rotary: dict[RopeConfig, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class PagedInputs:
    """What the attention layers of a step share where Triton's or C's kernels run it.

    Attributes:
        positions, slots: [T] int32, of each token, and where its key and value go in the cache.
        plans: By sliding window (None: none), which keys each sequence reads.
        rotary: By rope.
        batch_invariant: Whether chunks and decodes are computed in one form.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    plans: dict[int | None, PagedPlan] | dict[int | None, CpuPlan]
    rotary: dict[RopeConfig, RotaryTable]
    batch_invariant: bool


AttentionInputs = TorchInputs | PagedInputs


class Attention(nn.Module):
    """Grouped-query attention of one decoder layer."""

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
        query_size, key_size = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        qkv, output = [f"{prefix}.{name}_proj" for name in "qkv"], [f"{prefix}.o_proj"]
        self.qkv = Linear(
            qkv,
            config.hidden_size,
            [query_size, key_size, key_size],
            quantization.scheme(qkv),
            config.has_qkv_bias,
            ColumnParallel(group, self.head_dim),
        )
        output_scheme = quantization.scheme(output)
        self.output = Linear(
            output,
            query_size,
            [config.hidden_size],
            output_scheme,
            config.has_output_bias,
            row_parallel(group, query_size, config.hidden_size, output_scheme),
        )
        self.query_norm = self.key_norm = None
        if config.has_query_key_norm:
            norm = (self.head_dim, config.norm_epsilon, config.norm_offset, dtype)
            self.query_norm = RMSNorm(f"{prefix}.q_norm", *norm)
            self.key_norm = RMSNorm(f"{prefix}.k_norm", *norm)

    def forward(self, x: Activations, cache: KVLayer, inputs: AttentionInputs) -> torch.Tensor:
        """x [T, hidden] → [T, hidden]; the step's keys and values are written to the cache."""
        heads = self.qkv(x).view(num_tokens(x), -1, self.head_dim)
        attend = self._in_torch if isinstance(inputs, TorchInputs) else self._paged
        return self.output(attend(heads, cache, inputs))  # type: ignore[arg-type, operator]

    def _in_torch(self, heads: torch.Tensor, cache: KVLayer, inputs: TorchInputs) -> torch.Tensor:
        if self.query_norm is not None and self.key_norm is not None:
            sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
            queries, keys, values = torch.split(heads, sizes, dim=1)
            queries, keys = self.query_norm(queries.contiguous()), self.key_norm(keys.contiguous())
            heads = torch.cat((queries, keys, values), dim=1)
        queries = attention.rotate_and_write(
            heads, *inputs.rotary[self.rope], cache, inputs.slots, self.num_kv_heads
        )
        return attention.paged_attention(queries, cache, inputs.plans[self.window], self.scale)

    def _paged(self, heads: torch.Tensor, cache: KVLayer, inputs: PagedInputs) -> torch.Tensor:
        table = inputs.rotary[self.rope]
        queries = rotary.rotate_and_write(
            heads,
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
        return paged_attention.paged_attention(
            queries,
            cache,
            inputs.plans[self.window],
            self.scale,
            self.window,
            batch_invariant=inputs.batch_invariant,
        )
