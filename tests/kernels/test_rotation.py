"""Rotation in blocks: what it is, that it changes no product, and that all bodies agree to the bit."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import cpu
from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.norm import rms_norm
from engine.kernels.operands import SparseInt8Format
from engine.kernels.quantize import quantize_sparse, sparse_reference
from engine.kernels.rotation import rotate
from engine.quant.cpu_formats import CPU_ACTIVATIONS
from tests.kernels.test_cpu_elementwise import assert_same, tokens, unpack

BLOCKS = {
    31: [],
    32: [32],
    64: [64],
    96: [64, 32],
    128: [128],
    130: [128],
    224: [128, 64, 32],
    576: [128] * 4 + [64],
    1536: [128] * 12,
}
"""By K."""

ROTATED = SparseInt8Format(CPU_ACTIVATIONS.spread, is_rotated=True)


def block_diagonal(in_features: int) -> torch.Tensor:
    """H [K, K] float64, of Sylvester's matrices as their products."""
    blocks = []
    for size in BLOCKS[in_features]:
        block = torch.ones(1, 1, dtype=torch.float64)
        while len(block) < size:
            block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), block)
        blocks.append(block * size**-0.5)
    rest = in_features - sum(BLOCKS[in_features])
    return torch.block_diag(*blocks, torch.eye(rest, dtype=torch.float64))


@pytest.mark.parametrize("in_features", BLOCKS)
def test_a_rotation_is_hadamard_matrices_along_k(in_features: int) -> None:
    matrix = block_diagonal(in_features)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(in_features, dtype=torch.float64))
    x = torch.randn(7, in_features, dtype=torch.float64)
    torch.testing.assert_close(rotate(x), x @ matrix)
    torch.testing.assert_close(rotate(x.float()), (x @ matrix).float())
    torch.testing.assert_close(rotate(rotate(x)), x)


@pytest.mark.parametrize("in_features", BLOCKS)
def test_products_stay(in_features: int) -> None:
    x, weight = torch.randn(20, in_features), torch.randn(30, in_features)
    product = rotate(x).double() @ rotate(weight).double().T
    torch.testing.assert_close(product, x.double() @ weight.double().T, rtol=0, atol=1e-5 * in_features**0.5)


def test_a_share_of_whole_blocks_is_rotated_as_in_the_whole() -> None:
    x = torch.randn(3, 768)
    assert torch.equal(torch.cat([rotate(part) for part in x.split(256, dim=1)], dim=1), rotate(x))


@pytest.mark.parametrize("in_features", BLOCKS)
def test_c_rotates_to_the_bit_as_torch_whatever_writes_the_codes(in_features: int) -> None:
    if cpu.library() is None:
        pytest.skip("there is no C compiler on this machine")
    x, weight = tokens(in_features), torch.randn(in_features)
    gates = torch.cat((tokens(in_features), torch.randn(20, in_features)), dim=1)
    made = {
        "quantize": (quantize_sparse(x, ROTATED), x),
        "norm": (rms_norm(x.clone(), weight, 1e-5, ROTATED), rms_norm(x.clone(), weight, 1e-5)),
        "silu": (silu_mul(gates, ROTATED), silu_mul(gates)),
        "gelu": (gelu_mul(gates, ROTATED), gelu_mul(gates)),
    }
    for codes, plain in made.values():
        terms, scale = unpack(codes, in_features)  # type: ignore[arg-type]
        expected, expected_scale = sparse_reference(plain, ROTATED)  # type: ignore[arg-type]
        assert_same(scale, expected_scale[:, 0])
        assert torch.equal(terms.float(), expected)
    for token in range(20):
        alone, _ = unpack(quantize_sparse(x[token : token + 1], ROTATED), in_features)
        assert torch.equal(alone, unpack(quantize_sparse(x, ROTATED), in_features)[0][:, token : token + 1])
