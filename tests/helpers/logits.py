"""Rows of logits, and which of their tokens may be drawn."""

from __future__ import annotations

import math

import numpy as np
import torch


def random_logits(kind: str, num_rows: int, vocab_size: int) -> torch.Tensor:
    """[num_rows, vocab_size] float32 of one kind, the same ones each time."""
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 3
    match kind:
        case "rounded":
            return logits.bfloat16().float()
        case "tied":
            return logits.round()
        case "equal":
            return torch.full_like(logits, -1.5)
        case "flat":
            return logits / 30
        case "masked":
            return logits.masked_fill(torch.arange(vocab_size) % 7 != 0, -math.inf)
        case "wide":
            return logits.sign() * logits.exp().exp().clamp(max=1e30)
        case "low":
            return logits - 1000
    return logits


def bitmask(allowed: list[list[int]], vocab_size: int) -> torch.Tensor:
    """[rows, ceil(vocab_size / 32)] int32 with the bits of these tokens."""
    bits = np.zeros((len(allowed), -(-vocab_size // 32) * 32), np.uint8)
    for row, token_ids in enumerate(allowed):
        bits[row, token_ids] = 1
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32))
