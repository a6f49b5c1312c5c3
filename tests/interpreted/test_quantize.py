"""Quantization of activations: the Triton body gives the reference's integers and scales, to the bit."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.operands import Int8Format
from engine.kernels.quantize import quantize_per_token, reference

FORMATS = [Int8Format(terms, group_size) for terms in (1, 2) for group_size in (None, 32, 64, 128)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(x: torch.Tensor, format: Int8Format) -> None:
    actual, expected = quantize_per_token(x, format), reference(x, format)
    assert torch.equal(actual.high, expected.high)
    assert torch.equal(actual.scale, expected.scale)
    assert (actual.low is None) == (expected.low is None) == (format.terms == 1)
    if actual.low is not None and expected.low is not None:
        assert torch.equal(actual.low, expected.low)
    assert actual.dtype == x.dtype


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "in_features"), [(1, 64), (3, 576), (17, 50), (2, 7)])
def test_equals_the_reference(
    num_tokens: int, in_features: int, dtype: torch.dtype, format: Int8Format
) -> None:
    x = random(num_tokens, in_features).to(dtype) * 3
    x[0, in_features // 2] = 1000.0
    x[-1, :5] = 0.0
    assert_equal(x, format)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_ties_zeros_and_extremes(format: Int8Format) -> None:
    x = torch.zeros(5, 256)
    # With 127 in every group the scale is 1 (or next to it): halves are ties, rounded to even.
    x[0] = torch.arange(256) / 2 - 63.5
    x[0, ::32] = 127.0
    x[1] = random(256) * 1e-38
    x[2] = random(256) * 1e37
    x[3, 5] = torch.finfo(torch.float32).max
    assert_equal(x, format)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_is_not_finite_has_no_scale(format: Int8Format, value: float) -> None:
    x = random(3, 128)
    x[1, 70] = value
    actual, expected = quantize_per_token(x, format), reference(x, format)
    assert actual.scale[1].isnan().any()
    assert torch.equal(actual.scale.isnan(), expected.scale.isnan())
    assert actual.scale[[0, 2]].isfinite().all()


def test_strided_rows_and_the_layout_of_two_terms() -> None:
    x = random(3, 4, 64)[:, 1]
    y = quantize_per_token(x, Int8Format(2))
    assert y.low is not None
    assert torch.equal(y.high, reference(x, Int8Format(2)).high)
    rows = torch.as_strided(y.high, (6, 64), (64, 1))
    assert torch.equal(rows[0::2], y.high)
    assert torch.equal(rows[1::2], y.low)
