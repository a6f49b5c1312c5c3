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

A few elements of a token are far larger than the others. One scale for all of them leaves the others few steps;
here the scale suits the others, and the few get a second term. By layer the best spreads differ little (output
projections would take 1.5). The scale is made of maxima, which is a reduction without an order, so that a row cut
over several processes can find the same one.
"""

from __future__ import annotations

import torch

from engine.kernels.activations import SparseInt8Format
from engine.kernels.host_matmul import HostInt8Matmul, Int4Grid

HOST_ACTIVATIONS = SparseInt8Format(spread=1.2)


def host_product(
    weight: torch.Tensor | Int4Grid, scale: torch.Tensor, bias: torch.Tensor | None
) -> HostInt8Matmul:
    """The product with a weight [N, K] of int8 codes and scales [N] float32."""
    return HostInt8Matmul(weight, scale, bias, HOST_ACTIVATIONS)
