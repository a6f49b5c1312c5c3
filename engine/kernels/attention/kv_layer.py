"""The tensors of the paged KV cache, as floats or quantized."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.kernels.nibbles import pack_nibbles, unpack_nibbles

FP8_MAX = 448.0
"""The largest float8_e4m3fn; what is stored saturates at it."""

INT4: torch.dtype = torch.uint4  # type: ignore[attr-defined]  # torch's stubs lack it
"""Four bits, of which torch has the name and no tensors: they lie in pairs in torch.uint8."""

INT4_GROUP = 32
"""Elements of a vector that share a scale and a minimum; its last group may be shorter."""

INT4_LARGEST = 15

INT4_MULTIPLE = 4
"""What divides head_dim: both halves of a vector, which are rotated together, are whole bytes."""

CACHE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn, INT4)


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Keys and values of one layer by block and slot.

    In four bits x = code * scale + minimum, with a scale and a minimum for each group of a token's and head's own
    elements, so that what is stored of a token never changes.

    Attributes:
        data: [2, blocks, block_size, kv_heads, head_dim], keys then values: bf16, fp16, fp32, int8 codes, or
            float8_e4m3fn, which has no scale. For `INT4` [.., head_dim / 2] uint8: two codes of 0 … 15 a byte, the
            even elements' in the low nibbles; head_dim is a multiple of `INT4_MULTIPLE`.
        scales: For int8 [2, blocks, block_size, kv_heads] float32, one a token and head; for `INT4` [.., groups, 2]
            fp16, the scale and the minimum of each group; None for the others.
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
    def dtype(self) -> torch.dtype:
        """The cache's type, one of `CACHE_TYPES`."""
        return INT4 if self.data.dtype == torch.uint8 else self.data.dtype

    @property
    def type_number(self) -> int:
        """The cache's type as the C bodies number them (kernels/cpu/kernels.h)."""
        return CACHE_TYPES.index(self.dtype)

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the slots [L] as floats, [L, kv_heads, head_dim] float32 each."""
        keys, values = (half.flatten(0, 1)[slots] for half in self.data)
        if self.scales is None:
            return keys.float(), values.float()
        key_scales, value_scales = (half.flatten(0, 1)[slots] for half in self.scales)
        if self.dtype == INT4:
            return _from_int4(keys, key_scales), _from_int4(values, value_scales)
        return keys * key_scales[..., None], values * value_scales[..., None]

    def write(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values, [T, kv_heads, head_dim] floats each, in the slots [T].

        What is not finite is not finite when it is read; so is, in four bits, a group whose minimum or scale is
        beyond fp16.
        """
        for half, rows in enumerate((keys.float(), values.float())):
            if self.scales is not None and self.dtype == INT4:
                rows, self.scales[half].flatten(0, 1)[slots] = _to_int4(rows)
            elif self.scales is not None:
                # The smallest normal float avoids 0 / 0 for a vector of zeros.
                scale = (rows.abs().amax(dim=-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
                self.scales[half].flatten(0, 1)[slots] = scale
                rows = (rows / scale[..., None]).round()
            elif self.data.dtype == torch.float8_e4m3fn:
                rows = rows.clamp(-FP8_MAX, FP8_MAX)
            self.data[half].flatten(0, 1)[slots] = rows.to(self.data.dtype)


def _to_int4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, kv_heads, head_dim] float32 → codes in pairs [.., head_dim / 2] uint8 and scales [.., groups, 2] fp16."""
    codes, scales = [], []
    for group in rows.split(INT4_GROUP, dim=-1):
        lowest, highest = group.aminmax(dim=-1, keepdim=True)
        # Codes are chosen for the minimum and the scale as they are stored.
        minimum = lowest.half()
        scale = ((highest - minimum.float()) / INT4_LARGEST).clamp(min=0).half()
        divisor = torch.where(scale > 0, scale.float(), 1.0)
        steps = ((group - minimum.float()) / divisor).round().clamp(0, INT4_LARGEST)
        codes.append(steps.nan_to_num(0).to(torch.uint8))
        scales.append(torch.cat((scale, minimum), dim=-1))
    pairs = pack_nibbles(torch.cat(codes, dim=-1).flatten(0, 1))
    return pairs.view(*rows.shape[:-1], rows.shape[-1] // 2), torch.stack(scales, dim=-2)


def _from_int4(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `_to_int4`, in float32."""
    codes = unpack_nibbles(data.flatten(0, 1)).view(*data.shape[:-1], 2 * data.shape[-1])
    by_element = scales.float().repeat_interleave(INT4_GROUP, dim=-2)
    scale, minimum = by_element[..., : codes.shape[-1], :].unbind(-1)
    return codes * scale + minimum


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
        scales = None
        if dtype == INT4:
            scales = torch.empty(*shape, _num_groups(head_dim), 2, dtype=torch.float16, device=device)
            return KVCache(torch.empty(*shape, head_dim // 2, dtype=torch.uint8, device=device), scales)
        if dtype == torch.int8:
            scales = torch.empty(shape, dtype=torch.float32, device=device)
        return KVCache(torch.empty(*shape, head_dim, dtype=dtype, device=device), scales)


def block_bytes(
    num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of one block in all layers, its scales included."""
    if dtype == INT4:
        vector = head_dim // 2 + 2 * 2 * _num_groups(head_dim)
    else:
        vector = head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    return 2 * num_layers * block_size * num_kv_heads * vector


def _num_groups(head_dim: int) -> int:
    return -(-head_dim // INT4_GROUP)
