"""RMSNorm: the Triton body is close to its formula, and its formats are those of its rounded result, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import quantize
from engine.kernels.norm import reference, rms_norm
from engine.kernels.operands import GroupSums, Int8Activations, Int8Format, SumsFormat

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDED = DTYPES[:2]
"""The interpreter cuts off what it should round to bf16."""
SHAPES = [(1, 64), (3, 576), (17, 50), (2, 3, 80)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_floats(y: object) -> torch.Tensor:
    assert isinstance(y, torch.Tensor)
    return y


def pairwise_sums(values: torch.Tensor) -> torch.Tensor:
    """[M, K] → the sums of each 32 along K, neighbours first."""
    sums = F.pad(values.float(), (0, -values.shape[1] % 32))
    for _ in range(5):
        sums = sums[:, 0::2] + sums[:, 1::2]
    return sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_close_to_its_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype) * 3, random(shape[-1], seed=1, dtype=dtype)
    exact = reference(x.double().float(), weight.float(), 1e-5).double()
    # A sum of H squares in float32 is off by at most H roundings of 2^-24, its root by half of that; the root,
    # the quotient and both products by one each; then one rounding to the dtype (for bf16 here, a cut).
    tolerance = (shape[-1] / 2 + 4) * 2**-24 * 2 + torch.finfo(dtype).eps / (
        1 if dtype == torch.bfloat16 else 2
    )
    y = as_floats(rms_norm(x, weight, 1e-5))
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.all((y.double() - exact).abs() <= exact.abs() * tolerance + torch.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_residual_is_added_first_and_rounded(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, delta, weight = (
        random(*shape, dtype=dtype),
        random(*shape, seed=2, dtype=dtype),
        random(shape[-1], seed=1),
    )
    weight = weight.to(dtype)
    added = x + delta
    expected = as_floats(rms_norm(added, weight, 1e-5))
    assert torch.equal(as_floats(rms_norm(x, weight, 1e-5, delta=delta)), expected)
    assert torch.equal(x, added)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "format", [Int8Format(1), Int8Format(2), Int8Format(2, 32), Int8Format(1, 128)], ids=str
)
@pytest.mark.parametrize("size", [64, 50, 576])
def test_int8_terms_are_those_of_the_rounded_result(
    size: int, format: Int8Format, dtype: torch.dtype
) -> None:
    x, weight = random(3, size, dtype=dtype), random(size, seed=1, dtype=dtype)
    expected = quantize.reference(as_floats(rms_norm(x, weight, 1e-5)), format)
    actual = rms_norm(x, weight, 1e-5, format)
    assert isinstance(actual, Int8Activations)
    assert actual.dtype == dtype
    assert torch.equal(actual.high, expected.high)
    assert torch.equal(actual.scale, expected.scale)
    if format.terms == 2:
        assert actual.low is not None
        assert expected.low is not None
        assert torch.equal(actual.low, expected.low)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 50, 576])
def test_sums_are_those_of_the_rounded_result(size: int, dtype: torch.dtype) -> None:
    x, weight = random(3, size, dtype=dtype), random(size, seed=1, dtype=dtype)
    values = as_floats(rms_norm(x, weight, 1e-5))
    actual = rms_norm(x, weight, 1e-5, SumsFormat())
    assert isinstance(actual, GroupSums)
    assert torch.equal(actual.values, values)
    assert torch.equal(actual.sums, pairwise_sums(values))


def test_heads_of_a_stack_and_rows_of_a_batch() -> None:
    heads, weight = random(5, 7, 64), random(64, seed=1)
    queries = heads.split((3, 4), dim=1)[1]
    together = as_floats(rms_norm(queries, weight, 1e-5))
    assert torch.equal(together, as_floats(rms_norm(queries.contiguous(), weight, 1e-5)))
    for token in range(5):
        assert torch.equal(as_floats(rms_norm(queries[token : token + 1], weight, 1e-5))[0], together[token])
