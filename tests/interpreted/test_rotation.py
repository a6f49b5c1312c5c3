"""Rotated activations in Triton: floats and sums are those of torch's rotation, to the bit, whatever writes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.norm import rms_norm
from engine.kernels.operands import Activations, Format, GroupSums, SumsFormat
from engine.kernels.quantize_triton import write_in_triton
from engine.kernels.rotation import rotate
from tests.interpreted.test_norm import pairwise_sums

ROTATED = SumsFormat(is_rotated=True)

SIZES = [50, 64, 224, 576]


def write_norm(x: torch.Tensor, format: Format) -> Activations:
    return rms_norm(x.clone(), torch.linspace(0.5, 2, x.shape[1]).to(x.dtype), 1e-5, format)


def write_silu(x: torch.Tensor, format: Format) -> Activations:
    return silu_mul(torch.cat((x, x.flip(0)), dim=1), format)


def write_gelu(x: torch.Tensor, format: Format) -> Activations:
    return gelu_mul(torch.cat((x, x.flip(0)), dim=1), format)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("write", [write_in_triton, write_norm, write_silu, write_gelu])
def test_equals_the_reference(
    write: Callable[[torch.Tensor, Format], Activations], dtype: torch.dtype, size: int
) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    x[0, size // 2] = 100.0
    plain, rotated = write(x, None), write(x, ROTATED)
    assert isinstance(plain, torch.Tensor)
    assert isinstance(rotated, GroupSums)
    assert rotated.values.dtype == dtype
    assert torch.equal(rotated.values, rotate(plain))
    assert torch.equal(rotated.sums, pairwise_sums(rotate(plain)))
