"""Gated activations: close to torch's, with formats that are those of the rounded result, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from engine.kernels import quantize
from engine.kernels.activation import gelu_mul, gelu_reference, silu_mul, silu_reference
from engine.kernels.launch import Tile
from engine.kernels.operands import Activations, GroupSums, Int8Activations, Int8Format, SumsFormat

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BODIES = {"silu": (silu_mul, silu_reference), "gelu": (gelu_mul, gelu_reference)}


def gates_and_ups(num_tokens: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(num_tokens, 2 * size, generator=torch.Generator().manual_seed(0)) * 3
    values[0, : min(size, 6)] = torch.tensor([0.0, -0.5, 88.0, -88.0, -300.0, 300.0])[:size]
    return values.to(dtype)


def as_floats(y: Activations) -> torch.Tensor:
    assert isinstance(y, torch.Tensor)
    return y


def pairwise_sums(values: torch.Tensor) -> torch.Tensor:
    """[M, K] → the sums of each 32 along K, neighbours first."""
    sums = F.pad(values.float(), (0, -values.shape[1] % 32))
    for _ in range(5):
        sums = sums[:, 0::2] + sums[:, 1::2]
    return sums


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 64), (3, 300), (17, 50), (2, 5)])
def test_is_close_to_torchs(name: str, num_tokens: int, size: int, dtype: torch.dtype) -> None:
    body, reference = BODIES[name]
    x = gates_and_ups(num_tokens, size, dtype)
    exact = reference(x.double())
    y = as_floats(body(x))
    assert y.dtype == dtype
    # exp(-u) is off by its argument's error, a few roundings of |u|; beyond |u| = 80 the value is its gate or
    # all but zero. tanh saturates in the reference from there on: hence the absolute part.
    # The interpreter cuts off what it should round to bf16.
    tolerance = 512 * 2**-24 + torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    smallest = 1e-6 * x.double().abs().amax() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal
    assert torch.all((y.double() - exact).abs() <= exact.abs() * tolerance + smallest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "format", [Int8Format(1), Int8Format(2), Int8Format(2, 32), Int8Format(1, 128)], ids=str
)
@pytest.mark.parametrize("body", [silu_mul, gelu_mul])
def test_int8_terms_are_those_of_the_rounded_result(
    body: Callable[..., Activations], format: Int8Format, dtype: torch.dtype
) -> None:
    x = gates_and_ups(3, 300, dtype)
    expected = quantize.reference(as_floats(body(x)), format)
    actual = body(x, format)
    assert isinstance(actual, Int8Activations)
    assert torch.equal(actual.high, expected.high)
    assert torch.equal(actual.scale, expected.scale)
    if format.terms == 2:
        assert actual.low is not None
        assert expected.low is not None
        assert torch.equal(actual.low, expected.low)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_the_rounded_result(dtype: torch.dtype) -> None:
    x = gates_and_ups(3, 300, dtype)
    values = as_floats(silu_mul(x))
    actual = silu_mul(x, SumsFormat())
    assert isinstance(actual, GroupSums)
    assert torch.equal(actual.values, values)
    assert torch.equal(actual.sums, pairwise_sums(values))


def test_rows_depend_neither_on_the_batch_nor_on_the_tile() -> None:
    x = gates_and_ups(5, 300, torch.float32)
    together = silu_mul(x, SumsFormat())
    assert isinstance(together, GroupSums)
    for rows, block in ((slice(0, 5), 32), (slice(0, 5), 512), (slice(3, 4), 64)):
        part = silu_mul(x[rows], SumsFormat(), Tile({"BLOCK": block}, 4, 1))
        assert isinstance(part, GroupSums)
        assert torch.equal(part.values, together.values[rows])
        assert torch.equal(part.sums, together.sums[rows])
