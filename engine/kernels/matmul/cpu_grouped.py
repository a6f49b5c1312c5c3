"""Products on a CPU in groups along K: of int8 weights, of the activations, or of both.

With one scale a token (and a second term for few elements, see `engine.kernels.quantize`):

    y[m, n] = (Σ_g float(Σ_{k in g} high * w) * scale[n, g] * 128
               + Σ_g float(Σ_{k in g} low * w) * scale[n, g]) * s[m] + bias[n]

With a scale for each group of a token, as `engine.kernels.matmul.int8` computes it on a GPU:

    y[m, n] = Σ_g float(Σ_{k in g} code * w) * s[m, g] * scale[n, g] + bias[n]

The sums of a group are int32 and exact, every float operation rounds once, in the order written here, and groups are
added one after the other: y is equal to the bit for every number of tokens, tile, instruction set and body.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.kernels import cpu, quantize
from engine.kernels.cpu.signatures import Argument
from engine.kernels.matmul.cpu_int8 import ALIGNMENT, PANEL, pack_int8, pad_rows
from engine.kernels.operands import (
    Activations,
    Format,
    GroupSize,
    Int8Activations,
    Int8Format,
    SparseInt8Activations,
    SparseInt8Format,
)
from engine.kernels.quantize import HIGH_STEPS, quantize_sparse, sparse_reference

GROUP_SIZES: tuple[GroupSize, ...] = (128, 64, 32)
"""What the products take. The exact sums of larger groups would not fit into a float's 24 bits."""


def quantize_groups(x: torch.Tensor, group_size: int) -> Int8Activations:
    """The C body of one term with groups: x [M, K] float32, K contiguous. Rows of codes are padded to 64."""
    num_tokens, in_features = x.shape
    stride = in_features + -in_features % ALIGNMENT
    codes = cpu.empty("quantize_groups", num_tokens, stride, dtype=torch.int8)
    scale = cpu.empty("quantize_groups", num_tokens, -(-in_features // group_size))
    cpu.run(
        "quantize_groups",
        num_tokens,
        x=x,
        x_stride=x.stride(0),
        size=in_features,
        group_size=group_size,
        codes=codes,
        stride=stride,
        scale=scale,
    )
    return Int8Activations(codes, None, scale, x.dtype)


class CpuGroupedMatmul:
    """The product with one weight.

    Args:
        weight: [N, K] int8.
        scale: [N, ceil(K / group_size)] float16; or [N] float32, where only activations have groups.
        group_size: One of `GROUP_SIZES`.
        bias: [N] float32.
        format: How the activations are quantized: with one scale a token, or as one term with groups of `group_size`.

    Attributes:
        format: That which the product takes ready-made; None where that are floats.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        group_size: GroupSize,
        bias: torch.Tensor | None,
        format: SparseInt8Format | Int8Format,
    ) -> None:
        assert group_size in GROUP_SIZES
        assert format == Int8Format(1, group_size) or isinstance(format, SparseInt8Format)
        assert scale.dim() == 2 or isinstance(format, Int8Format)
        self.out_features, self.in_features = weight.shape
        self.group_size, self._format = group_size, format
        self.format: Format = None
        self.weight, self.scale, self.bias = weight, scale, bias
        if cpu.library() is None:
            return
        self.weight, self.bias = pack_int8(weight), pad_rows(bias)
        padded = F.pad(scale, (0, 0) * (scale.dim() - 1) + (0, -scale.shape[0] % PANEL))
        if scale.dim() == 2:
            padded = padded.to(torch.float16).view(-1, PANEL, scale.shape[1]).transpose(1, 2)
        self.scale = padded.contiguous()
        if isinstance(format, SparseInt8Format):
            self.format = format

    def __call__(self, x: Activations) -> torch.Tensor:
        """[M, K] floats, or the format's codes → [M, N] of their dtype."""
        if cpu.library() is None:
            assert isinstance(x, torch.Tensor)
            return reference(x, self._format, self.weight, self.scale, self.group_size, self.bias)
        codes: dict[str, Argument]
        if isinstance(self._format, Int8Format):
            assert isinstance(x, torch.Tensor)
            groups = quantize_groups(x, self.group_size)
            stride, token_scale = groups.high.shape[1], groups.scale
            num_tokens, codes = len(x), {"low": groups.high, "tokens": None, "quads": None, "stride": stride}
        else:
            if isinstance(x, torch.Tensor):
                x = quantize_sparse(x, self._format)
            assert isinstance(x, SparseInt8Activations)
            num_tokens, codes, token_scale = x.num_tokens, x.arguments(), None
        y = cpu.empty("grouped_matmul", num_tokens, self.out_features)
        has_groups = self.scale.dim() == 3
        cpu.run(
            "grouped_matmul",
            num_tokens,
            **codes,
            token_scale=token_scale,
            weight=self.weight,
            group_scale=self.scale if has_groups else None,
            scale=None if has_groups else self.scale,
            bias=self.bias,
            size=self.in_features,
            group_size=self.group_size,
            features=self.out_features,
            output=y,
        )
        return y


def reference(
    x: torch.Tensor,
    format: SparseInt8Format | Int8Format,
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`CpuGroupedMatmul` with torch's operators: x [M, K] float, weight [N, K] int8."""
    if isinstance(format, Int8Format):
        codes = quantize.reference(x, format)
        terms, group_scale = codes.high.float()[None], codes.scale
    else:
        terms, token_scale = sparse_reference(x, format)
    totals = torch.zeros(len(terms), len(x), len(weight))
    groups = zip(terms.split(group_size, dim=2), weight.split(group_size, dim=1), strict=True)
    for group, (part, weights) in enumerate(groups):
        # Sums of at most 128 * 127 * 128: floats hold them, and what they are made of, exactly.
        share = part @ weights.float().t()
        if isinstance(format, Int8Format):
            share *= group_scale[:, group, None]
        totals += share * scale[:, group].float() if scale.dim() == 2 else share
    value = totals[0]
    if isinstance(format, SparseInt8Format):
        value = value.mul_(HIGH_STEPS).add_(totals[1]).mul_(token_scale)
    if scale.dim() == 1:
        value = value.mul_(scale)
    return (value if bias is None else value.add_(bias)).to(x.dtype)
