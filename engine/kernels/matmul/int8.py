"""int8 × int8 matrix product with exact int32 sums, for activations quantized as they come.

With a weight of one scale a row, and activations of one scale a token (`engine.kernels.quantize`):

    y[m, n] = (float(Σ_k high * weight) * 254 + float(Σ_k low * weight)) * (s[m] / 254) * scale[n] + bias[n]
    y[m, n] = float(Σ_k high * weight) * s[m] * scale[n] + bias[n]                       with one term

With groups along K, of the activations or of both, each group has its own exact sum, and these are added in
order (the weight's scale is a factor of each of them, or of their sum where it has no groups):

    y[m, n] = Σ_g float(Σ_{k in g} (high * 254 + low) * weight) * (s[m, g] / 254) * scale[n, g] + bias[n]

Sums of integers do not depend on the order, every float operation rounds once, in the order written here: y is
equal to the bit for every number of tokens, tile and body.
"""

from __future__ import annotations

import torch

from engine.kernels.embedding import lookup
from engine.kernels.launch import Tile, target_of
from engine.kernels.matmul.sparse24 import SparseCodes
from engine.kernels.operands import Activations, Format, Int8Activations, Int8Format
from engine.kernels.quantize import LOW_STEPS, quantize_per_token

MAX_IN_FEATURES = (2**31 - 1) // (255 * 127)
"""More products could overflow an int32 sum: at most 128 * 127 each, and room for what the C bodies add."""


TWO_TERMS = Int8Format(terms=2)


def reference(
    x: Int8Activations,
    weight: torch.Tensor | SparseCodes,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """`Int8Matmul` in plain arithmetic, the sums in int64; group_size is that of the activations."""
    token_scale = x.scale if x.low is None else x.scale * (1 / LOW_STEPS)
    transposed = (weight.expand() if isinstance(weight, SparseCodes) else weight).long().t()
    if group_size is None:
        value = (x.high.long() @ transposed).float()
        if x.low is not None:
            value = value * LOW_STEPS + (x.low.long() @ transposed).float()
        value = value * token_scale
    else:
        terms = x.high.long() if x.low is None else x.high.long() * LOW_STEPS + x.low.long()
        value = torch.zeros(terms.shape[0], weight.shape[0], device=scale.device)
        parts = zip(terms.split(group_size, dim=1), transposed.split(group_size), strict=True)
        for group, (codes, weights) in enumerate(parts):
            share = (codes @ weights).float() * token_scale[:, group, None]
            value = value + (share * scale[:, group] if scale.dim() == 2 else share)
    value = value * scale if scale.dim() == 1 else value
    return (value if bias is None else value + bias).to(x.dtype)


class Int8Matmul:
    """The product of activations, quantized a token at a time, with one int8 weight.

    Args:
        weight: [N, K] int8, K at most `MAX_IN_FEATURES`; or, without groups, sparse codes of eight bits.
        scale: [N] float32, or [N, ceil(K / group size)] with the groups of the format.
        bias: [N] float32.
        format: How the activations are quantized.

    Attributes:
        format: That which the product takes ready-made.
    """

    def __init__(
        self,
        weight: torch.Tensor | SparseCodes,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        format: Int8Format = TWO_TERMS,
    ) -> None:
        if weight.shape[1] > MAX_IN_FEATURES:
            raise ValueError(
                f"int8 sums of {weight.shape[1]} products can overflow; at most {MAX_IN_FEATURES}"
            )
        self.weight, self.scale, self.bias, self._format = weight, scale, bias, format
        self.format: Format = format
        self.arrivals = torch.zeros(weight.shape[0], dtype=torch.int32, device=scale.device)

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] floats, or the format's terms → [M, N] of their dtype."""
        if isinstance(x, torch.Tensor):
            x = quantize_per_token(x, self._format)
        assert isinstance(x, Int8Activations)
        group_size = self._format.group_size
        return int8_matmul(x, self.weight, self.scale, self.bias, group_size, self.arrivals)

    def rows(self, token_ids: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
        """See `engine.quant.scheme.TableMatmul`; no table is sparse."""
        assert isinstance(self.weight, torch.Tensor)
        return lookup(token_ids, self.weight, self.scale, self._format.group_size, dtype, factor)


def int8_matmul(
    x: Int8Activations,
    weight: torch.Tensor | SparseCodes,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    group_size: int | None = None,
    arrivals: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """The product of quantized activations.

    Args:
        x: As `quantize_per_token` makes it: the rows of both terms alternate in memory.
        group_size: That of the activations.
        arrivals: [N] int32 zeros, which are zeros again afterwards; None: the sums are not split along K.

    Returns:
        [M, N] of x's dtype.
    """
    target = target_of(scale)
    if target is None:
        return reference(x, weight, scale, bias, group_size)
    from engine.kernels.matmul.int8_triton import int8_matmul_in_triton

    return int8_matmul_in_triton(x, weight, scale, bias, group_size, arrivals, tile)
