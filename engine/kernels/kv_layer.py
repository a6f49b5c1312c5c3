"""The tensors of the paged KV cache, as floats or quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8_MAX = 448.0
"""The largest float8_e4m3fn; what is stored saturates at it."""

CACHE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Keys and values of one layer by block and slot.

    Attributes:
        data: [2, blocks, block_size, kv_heads, head_dim], keys then values: bf16, fp16, fp32, int8 codes, or
            float8_e4m3fn, which has no scale.
        scales: [2, blocks, block_size, kv_heads] float32, one a token and head; None unless int8.
    """

    data: torch.Tensor
    scales: torch.Tensor | None = None

    @property
    def keys(self) -> torch.Tensor:
        return self.data[0]

    @property
    def values(self) -> torch.Tensor:
        return self.data[1]

    @property
    def key_scales(self) -> torch.Tensor | None:
        return None if self.scales is None else self.scales[0]

    @property
    def value_scales(self) -> torch.Tensor | None:
        return None if self.scales is None else self.scales[1]

    @property
    def block_size(self) -> int:
        return self.data.shape[2]

    @property
    def type_number(self) -> int:
        """The cache's type as the C bodies number them (kernels/cpu/attention.c)."""
        return CACHE_TYPES.index(self.data.dtype)

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the slots [L] as floats, [L, kv_heads, head_dim] float32 each."""
        keys, values = (half.flatten(0, 1)[slots].float() for half in self.data)
        if self.scales is None:
            return keys, values
        key_scales, value_scales = (half.flatten(0, 1)[slots][..., None] for half in self.scales)
        return keys * key_scales, values * value_scales

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values, [T, kv_heads, head_dim] floats each, in the slots [T]."""
        for half, rows in enumerate((keys.float(), values.float())):
            if self.scales is not None:
                # The smallest normal float avoids 0 / 0 for a vector of zeros.
                scale = (rows.abs().amax(dim=-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
                self.scales[half].flatten(0, 1)[slots] = scale
                rows = (rows / scale[..., None]).round()
            elif self.data.dtype == torch.float8_e4m3fn:
                rows = rows.clamp(-FP8_MAX, FP8_MAX)
            self.data[half].flatten(0, 1)[slots] = rows.to(self.data.dtype)


@dataclass(frozen=True, slots=True)
class KVCache:
    """All layers: `data` and `scales` as in `KVLayer`, behind a dimension of layers."""

    data: torch.Tensor
    scales: torch.Tensor | None

    @property
    def block_size(self) -> int:
        return self.data.shape[3]

    def layer(self, index: int) -> KVLayer:
        return KVLayer(self.data[index], None if self.scales is None else self.scales[index])

    @staticmethod
    def allocate(
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """An empty cache. Not zeroed: no slot is read before it is written, and memory that nobody uses is
        never touched.
        """
        shape = (num_layers, 2, num_blocks, block_size, num_kv_heads)
        scales = torch.empty(shape, dtype=torch.float32, device=device) if dtype == torch.int8 else None
        return KVCache(torch.empty(*shape, head_dim, dtype=dtype, device=device), scales)


def block_bytes(
    num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of one block in all layers, its scales included."""
    scale = 4 if dtype == torch.int8 else 0
    return 2 * num_layers * block_size * num_kv_heads * (head_dim * dtype.itemsize + scale)
