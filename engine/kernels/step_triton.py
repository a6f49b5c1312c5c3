"""What a step does on the device before the model: block tables that grow, tokens drawn the step before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.launch import Tile, launch

_TILE = Tile({"BLOCK": 1024}, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["num_updates"])
def _update_tables_kernel(tables, indices, blocks, num_updates, BLOCK: tl.constexpr):
    update = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = update < num_updates
    tl.store(tables + tl.load(indices + update, mask=mask), tl.load(blocks + update, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _resolve_tokens_kernel(token_ids, last_tokens, resolved, num_tokens, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_tokens
    token = tl.load(token_ids + index, mask=mask, other=0)
    drawn = tl.load(last_tokens - 1 - token, mask=mask & (token < 0), other=0)
    # A row whose logits were not finite has no token; what is computed of it is dropped.
    tl.store(resolved + index, tl.where(token < 0, tl.maximum(drawn, 0), token), mask=mask)


def update_tables(tables: torch.Tensor, indices: torch.Tensor, blocks: torch.Tensor) -> None:
    """Writes block ids [U] at indices [U] of the flattened block tables [rows, width]; all int32."""
    arguments = {"tables": tables, "indices": indices, "blocks": blocks, "num_updates": len(indices)}
    launch(_update_tables_kernel, (triton.cdiv(len(indices), _TILE["BLOCK"]),), arguments, _TILE)


def resolve_tokens(token_ids: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    """Token ids [T] int32 with those below 0 looked up: -1 - slot stands for `last_tokens[slot]` ([slots] int32)."""
    resolved = torch.empty_like(token_ids)
    arguments = {
        "token_ids": token_ids,
        "last_tokens": last_tokens,
        "resolved": resolved,
        "num_tokens": len(token_ids),
    }
    launch(_resolve_tokens_kernel, (triton.cdiv(len(token_ids), _TILE["BLOCK"]),), arguments, _TILE)
    return resolved
