"""Schemes: storage as announced, grids kept, and products that equal the dequantized weight's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import int4_matmul
from engine.kernels.host_matmul import int4_grid, reference
from engine.kernels.int8_matmul import MAX_IN_FEATURES
from engine.kernels.nibbles import pack_nibbles
from engine.kernels.quantize import sparse_reference
from engine.quant.floating import Float
from engine.quant.host import HOST_ACTIVATIONS
from engine.quant.int4 import Int4
from engine.quant.int8 import Int8
from engine.quant.int8_table import Int8Table
from engine.quant.scheme import Storage
from engine.quant.weight import GridWeight

STORAGES: list[Storage] = [Float(torch.float32), Int8(), Int4(32), Int4(128), Int8Table()]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", STORAGES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("shape", [(48, 64), (17, 33), (32, 576), (5, 1)])
def test_storage_is_what_quantize_returns(scheme: Storage, shape: tuple[int, int]) -> None:
    announced = scheme.storage(*shape)
    actual = scheme.quantize(random(*shape))
    assert {key: (t.shape, t.dtype) for key, t in actual.items()} == {
        key: (t.shape, t.dtype) for key, t in announced.items()
    }


def test_names_are_unique() -> None:
    assert len({scheme.name for scheme in STORAGES}) == len(STORAGES)


def grid_q4(rows: int, columns: int) -> GridWeight:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 32, generator=generator).half() * 0.1
    minimum = -torch.rand(rows, columns // 32, generator=generator).half()
    return GridWeight(codes, scale, minimum, 32)


def test_int4_keeps_the_grid_of_q4_1() -> None:
    weight = grid_q4(32, 96)
    stored = Int4(32).quantize(weight)
    kept = int4_matmul.dequantize(stored["codes"], stored["scale"], stored["minimum"], 32, 96)
    assert torch.equal(kept, weight.dequantize())


def test_int8_table_keeps_the_grid_of_q8_0() -> None:
    codes = torch.randint(-127, 128, (10, 64), dtype=torch.int8)
    weight = GridWeight(codes, torch.rand(10, 2).half(), None, 32)
    rows = Int8Table().lookup(Int8Table().quantize(weight), torch.tensor([3, 0, 3]), torch.float32, 1.0)
    assert torch.equal(rows, weight.dequantize()[[3, 0, 3]])


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("columns", [32, 576, 1536, 50, 7])
def test_int4_rounds_to_half_a_step(group_size: int, columns: int) -> None:
    values = random(16, columns)
    stored = Int4(group_size).quantize(values)
    rounded = int4_matmul.dequantize(stored["codes"], stored["scale"], stored["minimum"], group_size, columns)
    step = stored["scale"].float().repeat_interleave(group_size, dim=1)[:, :columns]
    # Half a step, and what fp16 takes off the ends of the range (11 bits of 15 steps and the minimum).
    assert torch.all((rounded - values).abs() <= step * (0.5 + 16 * 2**-10) + values.abs().max() * 2**-10)


def test_int8_rounds_to_half_a_step() -> None:
    values = random(16, 100)
    values[3] = 0
    stored = Int8().quantize(values)
    error = stored["weight"].float() * stored["scale"][:, None] - values
    assert torch.all(error.abs() <= stored["scale"][:, None] * 0.5001)
    assert torch.all(stored["weight"][3] == 0)


def activation_step(x: torch.Tensor) -> torch.Tensor:
    """What an int8 product's activations are multiples of, [M, 1] float64."""
    return sparse_reference(x, HOST_ACTIVATIONS)[1].double()


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (17, 33), (960, 576), (8, 1536)])
def test_int8_product_equals_its_reference_to_the_bit(num_tokens: int, rows: int, columns: int) -> None:
    stored = Int8().quantize(random(rows, columns))
    x, bias = random(num_tokens, columns, seed=1) * 3, random(rows, seed=2)
    product = Int8().bind(stored, bias)(x)
    assert torch.equal(product, reference(x, HOST_ACTIVATIONS, stored["weight"], stored["scale"], bias))


def test_int8_product_is_close_to_the_float_product() -> None:
    stored = Int8().quantize(random(64, 576))
    weight = stored["weight"].double() * stored["scale"].double()[:, None]
    x = random(9, 576, seed=1)
    x[:, 5] *= 100  # an outlier, the case one int8 term cannot hold
    expected = x.double() @ weight.t()
    bound = activation_step(x) / 2 * weight.abs().sum(dim=1)
    assert torch.all((Int8().bind(stored, None)(x).double() - expected).abs() <= bound * 1.01)


@settings(max_examples=40, deadline=None)
@given(others=st.integers(0, 40), row=st.integers(0, 40), seed=st.integers(0, 99))
def test_int8_rows_do_not_depend_on_the_batch(others: int, row: int, seed: int) -> None:
    stored = Int8().quantize(random(48, 576))
    x = random(others + 1, 576, seed=seed)
    row %= others + 1
    matmul = Int8().bind(stored, None)
    assert torch.equal(matmul(x)[row], matmul(x[row : row + 1])[0])


def test_int8_of_zeros_is_zero() -> None:
    stored = Int8().quantize(random(8, 64))
    assert torch.equal(Int8().bind(stored, None)(torch.zeros(2, 64)), torch.zeros(2, 8))


def test_int8_refuses_sums_that_overflow() -> None:
    assert Int8().storage(8, MAX_IN_FEATURES)
    with pytest.raises(ValueError, match="overflow"):
        Int8().storage(8, MAX_IN_FEATURES + 1)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("num_tokens", [1, 3, 17, 130])
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (17, 64), (16, 50), (5, 7), (960, 576)])
def test_int4_product_is_close_to_its_reference(
    num_tokens: int, rows: int, columns: int, group_size: int
) -> None:
    scheme = Int4(group_size)
    stored = scheme.quantize(random(rows, columns))
    x = random(num_tokens, columns, seed=1)
    codes, scale, minimum = (stored[name] for name in ("codes", "scale", "minimum"))
    weight = int4_matmul.dequantize(codes, scale, minimum, group_size, columns).double()
    expected = x.double() @ weight.t()
    repeats = group_size // 32
    scale, minimum = (x.repeat_interleave(repeats, dim=1) for x in (scale, minimum))
    grid, row_scale = int4_grid(codes, scale, minimum)
    on_grid = grid.expand().double()[:, :columns] * row_scale.double()[:, None]
    # Each weight is off by half a step of the row's int8 grid and a little, each activation by half of its.
    bound = x.double().abs().sum(dim=1, keepdim=True) * row_scale * (0.5 + 9 / 256)
    bound += activation_step(x) / 2 * on_grid.abs().sum(dim=1)
    assert torch.all((scheme.bind(stored, None)(x).double() - expected).abs() <= bound * 1.01)


def test_int4_rows_do_not_depend_on_the_batch() -> None:
    matmul = Int4(32).bind(Int4(32).quantize(random(48, 576)), None)
    x = random(70, 576, seed=2)
    together = matmul(x)
    for row in (0, 1, 33, 69):
        assert torch.equal(together[row], matmul(x[row : row + 1])[0])


def test_nibbles_lie_even_low_odd_high() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x03]]
