"""Rotation in blocks: activations and weights multiplied by Hadamard matrices along K, which changes no product.

    x Wᵀ = (x H) (W H)ᵀ        H = diag(H_128, …, H_128, H_64, H_32, 1, …)

H_n is Sylvester's matrix of n over its root: symmetric, and its own inverse. Blocks of 128 come first, and a rest of
64 and of 32 gets a smaller one, so that they follow from K alone. Every element is spread over its block: what stands
out of a group no longer coarsens the group's steps. Products read their activations rotated, so that nothing else of
the model changes (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4, has such rotations before some products,
and folds the others into the model; QuIP#, Tseng et al. 2024, arXiv:2402.04396, of weights before they are rounded).

Sums and differences of two are rounded one by one, neighbours first, halves last, and then the product with the
factor: the bodies in torch, C (`rotate_row` in kernels/cpu/elementwise.c) and Triton agree to the bit.
"""

from __future__ import annotations

import torch

from engine.kernels.hadamard import multiply_by_sylvester

ROTATION_BLOCK = 128
"""Elements along K that are rotated together; ranks that share K must hold whole ones."""

BLOCK_SIZES = (ROTATION_BLOCK, 64, 32)
"""In the order in which they lie."""


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x H along the last dimension, [..., K] float of any width, computed in float32 (float64 as it is)."""
    values = x if x.dtype == torch.float64 else x.float()
    pieces, start = [], 0
    for size in BLOCK_SIZES:
        stop = start + (values.shape[-1] - start) // size * size
        blocks = values[..., start:stop].unflatten(-1, (-1, size))
        pieces.append((multiply_by_sylvester(blocks) * size**-0.5).flatten(-2))
        start = stop
    return torch.cat((*pieces, values[..., start:]), dim=-1).to(x.dtype)
