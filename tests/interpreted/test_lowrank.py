"""Two factors on Triton's kernels: the bits of the two products, one after the other, in any batch."""

from __future__ import annotations

import pytest
import torch

from engine.quant.int4 import Int4
from engine.quant.int8 import Int8
from engine.quant.lowrank import LowRank
from engine.quant.scheme import Scheme
from engine.quant.weight import LowRankWeight


@pytest.mark.parametrize("factors", [Int8(), Int4(32)], ids=lambda scheme: scheme.name)
def test_the_products_are_those_of_the_factors(factors: Scheme) -> None:
    generator = torch.Generator().manual_seed(0)
    outer, inner, x = (torch.randn(*shape, generator=generator) for shape in ((40, 16), (16, 64), (5, 64)))
    scheme, bias = LowRank(factors, 16), torch.randn(40, generator=generator)
    matmul = scheme.bind(scheme.quantize(LowRankWeight(outer, inner)), bias)
    first = factors.bind(factors.quantize(inner), None)
    second = factors.bind(factors.quantize(outer), bias)
    y = matmul(x)
    assert torch.equal(y, second(first(x)))
    exact = x @ inner.t() @ outer.t() + bias
    assert (y - exact).norm() < (0.02 if isinstance(factors, Int8) else 0.2) * exact.norm()
    if isinstance(factors, Int8):
        assert torch.equal(matmul(x[:1]), y[:1])
