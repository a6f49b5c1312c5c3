"""int8 × int8 matrix product with exact int32 sums, for activations quantized as they come.

See `engine.quant.int8` for the formula.
"""

from __future__ import annotations

import torch

LOW_STEPS = 254
"""Steps of the low term in one step of the high term: the remainder is at most half a step, 127 low ones."""


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int8 terms and one scale a token.

    Args:
        x: [M, K] float.

    Returns:
        codes: [2 * M, K] int8, the high terms of all tokens, then the low terms.
        scale: [M, 1] float32; ``x ≈ (high + low / LOW_STEPS) * scale``.
    """
    num_tokens, in_features = x.shape
    x = x.float()
    scale = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).mul_(1 / 127)
    # A token of zeros keeps the scale 0 and codes of 0; the smallest normal float avoids 0 / 0.
    steps = x / scale.clamp(min=torch.finfo(torch.float32).tiny)
    high = steps.round()
    codes = torch.empty(2 * num_tokens, in_features, dtype=torch.int8, device=x.device)
    codes[:num_tokens] = high
    codes[num_tokens:] = steps.sub_(high).mul_(LOW_STEPS).round_()
    return codes, scale


def integer_product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[R, K] int8 × [N, K] int8 → [R, N] int32, exact as long as K < 2**31 / 127**2."""
    if codes.device.type == "cpu":
        return torch._int_mm(codes, weight.t())
    # cuBLAS wants more than 16 rows, in multiples of 8.
    num_rows = codes.shape[0]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, max(32 - num_rows, -num_rows % 8)))
    return torch._int_mm(padded, weight.t())[:num_rows]


def reference(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`int8_matmul` in plain arithmetic: the sums in int64."""
    num_tokens = x.shape[0]
    codes, token_scale = quantize_per_token(x)
    sums = codes.long() @ weight.long().t()
    value = sums[:num_tokens].float() * LOW_STEPS + sums[num_tokens:].float()
    return (value * (token_scale / LOW_STEPS) * scale).to(x.dtype)


def int8_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Product of float activations, quantized a token at a time, with an int8 weight.

    Args:
        x: [M, K] float.
        weight: [N, K] int8.
        scale: [N] float32.

    Returns:
        [M, N] of x's dtype.
    """
    num_tokens = x.shape[0]
    codes, token_scale = quantize_per_token(x)
    sums = integer_product(codes, weight).float()
    value = torch.add(sums[num_tokens:], sums[:num_tokens], alpha=LOW_STEPS)
    return value.mul_(token_scale.mul_(1 / LOW_STEPS)).mul_(scale).to(x.dtype)
