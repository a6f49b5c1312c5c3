"""Which activations a CPU's int8 products take, and what they cost.

Perplexity of SmolLM2-135M (the float32 weights of its GGUF file, 6 windows of 1,024 tokens, reference 16.50) is too
noisy to rank formats that differ by 0.05 %. What ranks them is the mean KL divergence from the reference's
distribution in 0.01 nat, about the change of perplexity in per cent to expect. Products are multiplications, those
with a single int8 term counted as 1. Simulated in float32 on 2026-11-22, with int8 weights, which cost 0.34 by
themselves:

    activations                                  KL of the activations   products
    one scale a token                                    2.95            1
    a scale for each 32 along K                          0.25            1, and a float sum for each 32
    two terms                                            0.00            2
    two terms, the second sparse, spread 0.7             0.03            1.27
                                         1.0             0.05            1.10
                                         1.2             0.06            1.06
                                         1.5             0.09            1.04

Measured with the kernels the same day on 4 windows of 512 tokens, the weights' rounding included, with the time of a
product of 1, 16 and 512 tokens with [1536, 576] on one thread (AVX-512 VNNI), that of int8 counted as 1:

    --quant                   KL     M = 1     16    512
    int8                    0.49      1.00   1.00   1.00
    int8:token              3.76      1.0    0.95   0.95
    int8:groups             0.69      1.0    1.1    1.2
    int8:two-terms          0.40      1.1    1.8    2.2
    int8:g32                0.21      1.1    1.2    1.3
    int8:g128               0.29      1.0    1.1    1.2
    int8:g32:groups         0.40      1.0    1.1    1.2
    int8:g32:weight-only    0.11      1.1    1.7    2.1

A few elements of a token are far larger than the others. One scale for all of them leaves the others few steps;
here the scale suits the others, and the few get a second term. By layer the best spreads differ little (output
projections would take 1.5). The scale is made of maxima, which is a reduction without an order, so that a row cut
over several processes can find the same one.
"""

from __future__ import annotations

import math

import torch

from engine.kernels.matmul.cpu_grouped import CpuGroupedMatmul
from engine.kernels.matmul.cpu_int8 import CpuInt8Matmul, CpuWeight
from engine.kernels.matmul.grouped_weight import GroupedWeight, GroupNumbers
from engine.kernels.operands import GroupSize, Int8Format, SparseInt8Format
from engine.quant.scheme import Matmul
from engine.quant_spec import ActivationTerms

CPU_ACTIVATIONS = SparseInt8Format(spread=1.2)

ONE_TERM = SparseInt8Format(spread=math.inf)
TWO_TERMS = SparseInt8Format(spread=0.0)
"""Scales so small that nearly every element has a second term: activations are integers of 15 bits."""

GROUP_SIZE: GroupSize = 32
"""Elements along K that share a scale where activations have groups."""


def cpu_product(
    weight: CpuWeight,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    activations: ActivationTerms = "default",
) -> Matmul:
    """The product with a weight [N, K] of int8 codes, or a grid that stands for them, and scales [N] float32."""
    if activations == "groups":
        assert isinstance(weight, torch.Tensor)
        grouped = GroupedWeight(codes=weight, in_features=weight.shape[1], group_size=GROUP_SIZE, scale=None)
        return CpuGroupedMatmul(grouped, scale, bias, Int8Format(1, GROUP_SIZE))
    return CpuInt8Matmul(weight, scale, bias, token_format(activations))


def cpu_grouped_product(
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_size: GroupSize,
    bias: torch.Tensor | None,
    activations: ActivationTerms = "default",
) -> Matmul:
    """The product with a weight [N, K] of int8 codes and scales [N, ceil(K / group_size)] float16."""
    format = Int8Format(1, group_size) if activations == "groups" else token_format(activations)
    grouped = GroupedWeight(
        codes=weight, in_features=weight.shape[1], group_size=group_size, scale=GroupNumbers(scale)
    )
    return CpuGroupedMatmul(grouped, None, bias, format)


def token_format(activations: ActivationTerms) -> SparseInt8Format:
    """What the product takes; activations: not "groups"."""
    return {"token": ONE_TERM, "two-terms": TWO_TERMS}.get(activations, CPU_ACTIVATIONS)
