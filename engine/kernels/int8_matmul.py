"""int8 × int8 matrix product with exact int32 sums, for activations quantized as they come.

See `engine.quant.int8` for the formula.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.kernels import cpu

LOW_STEPS = 254
"""Steps of the low term in one step of the high term: the remainder is at most half a step, 127 low ones."""


MAX_C_TOKENS = 16
"""Up to here the C body is the faster one (measured with 2 threads)."""


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
    """Both terms [M, K] int8 × [N, K] int8 → [M, N] int32 each, exact for K up to `MAX_IN_FEATURES`."""
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
    """`Int8Matmul` in plain arithmetic: the sums in int64."""
    high, low, token_scale = quantize_per_token(x)
    high_sum, low_sum = ((term.long() @ weight.long().t()).float() for term in (high, low))
    return ((high_sum * LOW_STEPS + low_sum) * (token_scale * (1 / LOW_STEPS)) * scale).to(x.dtype)


class Int8Matmul:
    """The product of float activations, quantized a token at a time, with one int8 weight.

    For a few float32 tokens on a CPU the C body reads the weight once for both terms; torch's integer product
    serves the rest. Their sums are equal integers, and what is done with the sums is the same arithmetic, so
    their results are equal to the bit.

    Args:
        weight: [N, K] int8.
        scale: [N] float32.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.weight, self.scale = weight, scale
        self.weight_sums: torch.Tensor | None = None
        if weight.device.type == "cpu" and cpu.library() is not None:
            self.weight_sums = weight.sum(dim=1, dtype=torch.int32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] float → [M, N] of x's dtype."""
        if self.weight_sums is not None and x.shape[0] <= MAX_C_TOKENS and cpu.serves(x):
            return self._c_product(x, self.weight_sums)
        high, low, token_scale = quantize_per_token(x)
        high_sum, low_sum = integer_products(high, low, self.weight)
        # Each operator rounds once: one that fuses a product and a sum may round differently in its tails.
        value = high_sum.float().mul_(LOW_STEPS).add_(low_sum)
        return value.mul_(token_scale.mul_(1 / LOW_STEPS)).mul_(self.scale).to(x.dtype)

    def _c_product(self, x: torch.Tensor, weight_sums: torch.Tensor) -> torch.Tensor:
        library = cpu.library()
        assert library is not None
        (num_tokens, in_features), out_features = x.shape, self.weight.shape[0]
        x = x.contiguous()
        y = x.new_empty(num_tokens, out_features)
        scratch = torch.empty(num_tokens * (2 * in_features + 4) + 4, dtype=torch.uint8)
        library.int8_matmul(
            x.data_ptr(),
            self.weight.data_ptr(),
            self.scale.data_ptr(),
            weight_sums.data_ptr(),
            y.data_ptr(),
            scratch.data_ptr() + 4 * num_tokens,
            scratch.data_ptr(),
            num_tokens,
            out_features,
            in_features,
        )
        return y
