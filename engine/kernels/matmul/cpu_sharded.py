"""Products on a CPU whose input features are shared by ranks: int8 activations × int8 weights, summed as integers.

    s[m]          made of the largest |x[m, k]| of each 32 features of the whole token; see `engine.kernels.quantize`
    low[m, n]     Σ over ranks of Σ_k low[m, k] * w[n, k], and high[m, n] likewise
    y[m, n]       (float(high[m, n]) * 128 + float(low[m, n])) * s[m] * scale[n] + bias[n]

Maxima and sums of integers do not depend on their order, and what is rounded is rounded once, after the sum: so y is
`CpuInt8Matmul`'s to the bit, whatever the number of ranks. What they exchange between these steps their caller does;
each of them adds up and finishes a share of the outputs.

The C bodies are in kernels/cpu/sharded_matmul.c.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels import cpu
from engine.kernels.matmul.cpu_int8 import PANEL, pack
from engine.kernels.matmul.sparse24 import SparseCodes
from engine.kernels.operands import SparseInt8Activations, SparseInt8Format
from engine.kernels.quantize import SPREAD_BLOCK, empty_sparse


def num_terms(format: SparseInt8Format) -> int:
    """How many sums a product has."""
    return 1 if math.isinf(format.spread) else 2


def block_maxima(x: torch.Tensor) -> torch.Tensor:
    """The largest size of each 32 of x [M, K] float32, [M, K / 32]; infinity where one is not finite."""
    num_tokens, in_features = x.shape
    maxima = cpu.empty("block_maxima", num_tokens, in_features // SPREAD_BLOCK)
    cpu.run("block_maxima", num_tokens, x=x, x_stride=x.stride(0), size=in_features, maxima=maxima)
    return maxima


def quantize_part(x: torch.Tensor, maxima: torch.Tensor, format: SparseInt8Format) -> SparseInt8Activations:
    """x [M, part of K] float32 → its columns of what the whole tokens are quantized to.

    Args:
        maxima: [M, K / 32], of the whole tokens.
    """
    num_tokens, in_features = x.shape
    y = empty_sparse("quantize_part", num_tokens, in_features)
    cpu.run(
        "quantize_part",
        num_tokens,
        x=x,
        x_stride=x.stride(0),
        size=in_features,
        spread=format.spread / 127,
        **y.arguments(),
        maxima=maxima,
        num_blocks=maxima.shape[1],
    )
    return y


class ShardedInt8Matmul(nn.Module):
    """A rank's part of the product with one weight.

    Args:
        weight: [N, part of K] int8, or sparse codes of eight bits.
        scale: [N] float32.
        bias: [N] float32.
        outputs: Those that this rank finishes, one of `num_shares` shares of the same size.
        terms: Of the activations.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor | SparseCodes,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        outputs: slice,
        num_shares: int,
        terms: int,
    ) -> None:
        super().__init__()
        self.num_shares, self.terms, self.out_features = num_shares, terms, outputs.stop - outputs.start
        # Each share begins with a panel of its own.
        if isinstance(weight, SparseCodes):
            kept, masks = (self._padded(part) for part in (weight.kept, weight.masks))
            packed, self._kind = pack(SparseCodes(kept, masks))
        else:
            packed, self._kind = pack(self._padded(weight))
        self.register_buffer("weight", packed)
        self.register_buffer("scale", scale[outputs].clone())
        self.register_buffer("bias", None if bias is None else bias[outputs].clone())

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        shares = F.pad(rows.unflatten(0, (self.num_shares, -1)), (0, 0, 0, -self.out_features % PANEL))
        return shares.flatten(0, 1)

    def sums(self, x: SparseInt8Activations) -> torch.Tensor:
        """[M, part of K] → sums over it, int32 of the shape [M, shares * terms * N of a share].

        They lie as [shares, M, terms, N of a share], M the number of rows that there are.
        """
        width = self.num_shares * self.terms * self.out_features
        sums = cpu.empty("sum_products", x.num_tokens, width, dtype=torch.int32)
        cpu.run(
            "sum_products",
            x.num_tokens,
            **x.arguments(),
            weight=self.weight,
            weight_kind=self._kind,
            num_shares=self.num_shares,
            features=self.out_features,
            num_terms=self.terms,
            sums=sums,
        )
        return sums

    def finish(self, sums: torch.Tensor, x: SparseInt8Activations) -> torch.Tensor:
        """The ranks' sums of this rank's outputs, lying as [ranks, M, terms, N of a share] → [M, N of a share]."""
        y = cpu.empty("finish_sums", x.num_tokens, self.out_features)
        cpu.run(
            "finish_sums",
            x.num_tokens,
            sums=sums,
            num_shares=self.num_shares,
            features=self.out_features,
            num_terms=self.terms,
            tokens=x.tokens,
            scale=self.scale,
            bias=self.bias,
            output=y,
        )
        return y
