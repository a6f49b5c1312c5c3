"""int8 × int8 matrix product with exact int32 sums, for activations quantized as they come.

See `engine.quant.int8` for the formula.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

LOW_STEPS = 254
"""Steps of the low term in one step of the high term: the remainder is at most half a step, 127 low ones."""


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two int8 terms and one scale a token: ``x ≈ (high + low / LOW_STEPS) * scale``.

    Args:
        x: [M, K] float.

    Returns:
        high, low: [M, K] int8.
        scale: [M, 1] float32.
    """
    x = x.float()
    scale = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).mul_(1 / 127)
    # A token of zeros keeps codes of 0; the smallest normal float avoids 0 / 0.
    steps = x / scale.clamp_(min=torch.finfo(torch.float32).tiny)
    high = steps.round()
    low = steps.sub_(high).mul_(LOW_STEPS).round_()
    return high.to(torch.int8), low.to(torch.int8), scale


def integer_products(
    high: torch.Tensor, low: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both terms [M, K] int8 × [N, K] int8 → [M, N] int32 each, exact as long as K < 2**31 / 127**2."""
    num_tokens = high.shape[0]
    transposed = weight.t()
    if high.device.type == "cuda":
        # cuBLAS wants more than 16 rows, in multiples of 8.
        rows = F.pad(torch.cat((high, low)), (0, 0, 0, max(32 - 2 * num_tokens, -2 * num_tokens % 8)))
        sums = torch._int_mm(rows, transposed)
    elif num_tokens == 1:
        # For one row oneDNN has a faster product, even twice.
        return torch._int_mm(high, transposed), torch._int_mm(low, transposed)
    else:
        sums = torch._int_mm(torch.cat((high, low)), transposed)
    return sums[:num_tokens], sums[num_tokens : 2 * num_tokens]


def reference(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`int8_matmul` in plain arithmetic: the sums in int64."""
    high, low, token_scale = quantize_per_token(x)
    high_sum, low_sum = ((term.long() @ weight.long().t()).float() for term in (high, low))
    return ((high_sum * LOW_STEPS + low_sum) * (token_scale * (1 / LOW_STEPS)) * scale).to(x.dtype)


def int8_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Product of float activations, quantized a token at a time, with an int8 weight.

    Args:
        x: [M, K] float.
        weight: [N, K] int8.
        scale: [N] float32.

    Returns:
        [M, N] of x's dtype.
    """
    high, low, token_scale = quantize_per_token(x)
    high_sum, low_sum = integer_products(high, low, weight)
    # Each operator rounds once: one that fuses a product and a sum may round differently in its tails.
    value = high_sum.float().mul_(LOW_STEPS).add_(low_sum)
    return value.mul_(token_scale.mul_(1 / LOW_STEPS)).mul_(scale).to(x.dtype)
