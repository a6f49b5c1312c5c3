"""Rotary position embedding (Su et al. 2021) in the half-rotation layout of Hugging Face checkpoints.

On a GPU one launch normalizes, rotates, and writes keys and values into the paged cache. Queries and keys of an int8
cache are multiplied by a Hadamard matrix after that (hadamard.py).
"""

from __future__ import annotations

import torch

from engine.kernels import cpu
from engine.kernels.attention.kv_layer import KVLayer
from engine.kernels.hadamard import hadamard_factors, hadamard_levels, spread_heads
from engine.kernels.launch import target_of
from engine.kernels.norm import reference as norm_reference
from engine.kernels.norm import rms_norm


def apply_rotary(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotates each head by its token's position.

    Args:
        heads: [T, heads, head_dim].
        cosine: [T, 1, head_dim], both halves alike.
        sine: [T, 1, head_dim], the first half negated, so that the rotation is one roll and two products.
    """
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, dims=-1), sine)


def rotate_and_write(
    heads: torch.Tensor,
    positions: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    layer: KVLayer,
    slots: torch.Tensor,
    num_kv_heads: int,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """Rotates queries and keys by their positions and stores keys and values in the cache.

    Computed in float32 and rounded once, after the norm and at the end; by torch's operators in the heads' dtype.
    Queries and keys of an int8 cache are spread by `spread_heads`, whose factors cancel in their products.

    Args:
        heads: [T, query heads + 2 * num_kv_heads, head_dim], contiguous: queries, keys, values.
        positions: [T] int32.
        cosine, sine: [positions, head_dim / 2] float32.
        slots: [T] int32; tokens that are padding go to the null block.
        query_norm, key_norm: [head_dim], weights of an RMSNorm of each query and key head; both or neither.

    Returns:
        The rotated queries, [T, query heads, head_dim]; their tokens may be apart in memory.
    """
    target = target_of(heads)
    num_tokens, total, head_dim = heads.shape
    num_heads = total - 2 * num_kv_heads
    query_factor, key_factor = hadamard_factors(head_dim)
    if target is None and cpu.serves(heads):
        assert heads.is_contiguous()
        cpu.run(
            "rotate_and_write",
            num_tokens,
            heads=heads,
            positions=positions,
            cosine=cosine,
            sine=sine,
            slots=slots,
            query_norm=query_norm,
            key_norm=key_norm,
            epsilon=epsilon,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            keys=layer.keys,
            values=layer.values,
            key_scales=layer.key_scales,
            value_scales=layer.value_scales,
            cache_type=layer.type_number,
            hadamard_size=1 << hadamard_levels(head_dim),
            query_factor=query_factor,
            key_factor=key_factor,
        )
        return heads[:, :num_heads]  # rotated in place
    if target is None:
        return torch_rotate_and_write(
            heads, positions, cosine, sine, layer, slots, num_kv_heads, query_norm, key_norm, epsilon
        )
    from engine.kernels.rotary_triton import rotate_and_write_in_triton

    return rotate_and_write_in_triton(
        heads, positions, cosine, sine, layer, slots, num_kv_heads, query_norm, key_norm, epsilon
    )


def torch_rotate_and_write(
    heads: torch.Tensor,
    positions: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    layer: KVLayer,
    slots: torch.Tensor,
    num_kv_heads: int,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """`rotate_and_write` with torch's operators, in the heads' dtype."""
    num_heads = heads.shape[1] - 2 * num_kv_heads
    if query_norm is not None and key_norm is not None:
        queries, keys, values = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        normed_queries = rms_norm(queries.contiguous(), query_norm, epsilon)
        normed_keys = rms_norm(keys.contiguous(), key_norm, epsilon)
        assert isinstance(normed_queries, torch.Tensor)
        assert isinstance(normed_keys, torch.Tensor)
        heads = torch.cat((normed_queries, normed_keys, values), dim=1)
    c, s = cosine.index_select(0, positions), sine.index_select(0, positions)
    waves = torch.cat((c, c, -s, s), dim=-1).to(heads.dtype).unsqueeze(1)
    rotated = apply_rotary(heads[:, :-num_kv_heads], *waves.chunk(2, dim=-1))
    queries, keys = rotated[:, :num_heads], rotated[:, num_heads:]
    if layer.dtype == torch.int8:
        query_factor, key_factor = hadamard_factors(heads.shape[-1])
        queries = spread_heads(queries.float(), query_factor).to(heads.dtype)
        keys = spread_heads(keys.float(), key_factor)
    layer.write(slots.long(), keys, heads[:, -num_kv_heads:])
    return queries


def reference(
    heads: torch.Tensor,
    positions: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    layer: KVLayer,
    slots: torch.Tensor,
    num_kv_heads: int,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    epsilon: float = 0.0,
) -> torch.Tensor:
    """`rotate_and_write` in plain torch, in float32 and rounded where the kernels round."""
    num_heads = heads.shape[1] - 2 * num_kv_heads
    queries, keys, values = heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if query_norm is not None and key_norm is not None:
        queries, keys = (
            norm_reference(x, weight, epsilon) for x, weight in ((queries, query_norm), (keys, key_norm))
        )
    floats = torch.cat((queries, keys, values), dim=1).float()
    rotated = torch_rotate_and_write(floats, positions, cosine, sine, layer, slots, num_kv_heads)
    return rotated.to(heads.dtype)
