"""Float activations × weights of int8, or of the activations' own type, in one form for every number of tokens.

w[n, k] = weight[n, k] * scale[n, k // group_size], or scale[n] without groups, or weight[n, k] without a scale.

An int8 weight is exact in the activations' type, so nothing is rounded before the float32 sums; see
`engine.kernels.matmul.segments_triton` for their order. A token's bits depend neither on the other tokens nor on the
tile. As in `engine.kernels.matmul.int4_triton` the product is computed transposed, the tokens being the columns of
the matrix instruction.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from engine.kernels.embedding import lookup
from engine.kernels.launch import runs_triton
from engine.kernels.operands import Activations, Format, GroupSums

GroupSize = Literal[32, 64, 128] | None
"""Elements along K that share a scale; None for one scale a row."""


def dequantize(weight: torch.Tensor, scale: torch.Tensor | None, group_size: GroupSize) -> torch.Tensor:
    """[N, K] float32 from a weight [N, K] and its scale, [N] or with groups [N, groups] float32."""
    if scale is None:
        return weight.float()
    if group_size is None:
        return weight * scale[:, None]
    return weight * scale.repeat_interleave(group_size, dim=1)[:, : weight.shape[1]]


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    group_size: GroupSize = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[M, K] float × [N, K] + bias [N] → [M, N], in float32."""
    return F.linear(x.float(), dequantize(weight, scale, group_size), bias).to(x.dtype)


class WeightOnlyMatmul:
    """The product of float activations with one weight.

    Args:
        weight: [N, K] int8, or of the activations' type.
        scale: [N] float32, with groups [N, groups]; None for a weight that needs none.
        group_size: 32, 64 or 128 elements along K that share a scale; None for one scale a row.
        bias: [N] float32, added to the float32 sums.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor | None = None,
        group_size: GroupSize = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self.weight, self.scale, self.group_size, self.bias = weight, scale, group_size, bias
        self.format: Format = None
        if runs_triton(weight):
            from engine.kernels.matmul.segments_triton import new_counters

            self.counters = new_counters(weight.shape[0], weight.device)

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] float → [M, N] of x's dtype."""
        assert isinstance(x, torch.Tensor | GroupSums)
        values = x.values if isinstance(x, GroupSums) else x
        if runs_triton(values):
            from engine.kernels.matmul.weight_only_triton import weight_only_matmul

            return weight_only_matmul(
                values, self.weight, self.scale, self.group_size, self.bias, self.counters
            )
        weight = self.weight
        if self.scale is not None:
            weight = dequantize(weight, self.scale, self.group_size).to(values.dtype)
        product = F.linear(values, weight)
        return product if self.bias is None else (product + self.bias).to(values.dtype)

    def rows(self, token_ids: torch.Tensor, dtype: torch.dtype, factor: float) -> torch.Tensor:
        """See `engine.quant.scheme.TableMatmul`."""
        return lookup(token_ids, self.weight, self.scale, self.group_size, dtype, factor)
