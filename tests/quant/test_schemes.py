"""Schemes: storage as announced, grids kept, and products that equal the dequantized weight's."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.kernels.matmul import int4 as int4_matmul
from engine.kernels.matmul.cpu_int8 import reference
from engine.kernels.matmul.int8 import MAX_IN_FEATURES
from engine.kernels.nibbles import pack_nibbles
from engine.kernels.quantize import sparse_reference
from engine.quant import int8_groups
from engine.quant.codebook4 import Codebook4
from engine.quant.cpu_formats import CPU_ACTIVATIONS
from engine.quant.floating import Float
from engine.quant.int4 import Int4
from engine.quant.int8 import Int8
from engine.quant.int8_groups import Int8Groups
from engine.quant.int8_weight_only import Int8WeightOnly
from engine.quant.nf4 import NF4
from engine.quant.rotated import Rotated
from engine.quant.scheme import Storage, Tensors
from engine.quant.weight import GridWeight
from engine.quant_spec import ActivationTerms

INT8: list[Int8 | Int8Groups | Int8WeightOnly] = [
    *(Int8(activations) for activations in get_args(ActivationTerms)),
    *(Int8Groups(size, terms) for size in (32, 64, 128, 256) for terms in get_args(ActivationTerms)),
    *(Int8WeightOnly(size) for size in (None, 32, 64, 128, 256)),
]

STORAGES: list[Storage] = [
    Float(torch.float32),
    *INT8,
    Int4(32),
    Int4(128),
    Rotated(Int4(32)),
    NF4(),
    Codebook4(),
]


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


def grid_q8(rows: int, columns: int, group_size: int) -> GridWeight:
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    return GridWeight(codes, torch.rand(rows, -(-columns // group_size)).half(), None, group_size)


def dequantize(stored: Tensors, group_size: int | None) -> torch.Tensor:
    """The weight that an int8 scheme has stored, [N, K] float64."""
    columns = stored["weight"].shape[1]
    scale = stored["scale"].double().view(len(stored["scale"]), -1)
    return stored["weight"].double() * scale.repeat_interleave(group_size or columns, dim=1)[:, :columns]


@pytest.mark.parametrize("scheme", [Int8Groups(32), Int8WeightOnly(32)], ids=lambda scheme: scheme.name)
def test_int8_groups_keep_the_grid_of_q8_0(scheme: Int8Groups | Int8WeightOnly) -> None:
    weight = grid_q8(10, 100, 32)
    assert torch.equal(dequantize(scheme.quantize(weight), 32), weight.dequantize().double())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int8_groups_keep_codes_whose_scales_are_float32(group_size: int) -> None:
    grid = grid_q8(10, 300, group_size)
    weight = replace(grid, scale=grid.scale.float() * (1 + 1e-4) + 1e-3)
    stored = Int8Groups(group_size).quantize(weight)
    assert torch.equal(stored["weight"], weight.codes)
    assert torch.equal(stored["scale"], weight.scale.half())


@pytest.mark.parametrize("change", ["tiny", "other groups", "minimum"])
def test_int8_groups_round_other_grids_anew(change: str) -> None:
    grid = grid_q8(10, 128, 64)
    match change:
        case "tiny":  # fp16 has few bits for such
            weight = replace(grid, scale=grid.scale.float() * 1e-6)
        case "other groups":
            weight = replace(grid, scale=grid.scale.repeat_interleave(2, dim=1), group_size=32)
        case _:
            weight = replace(grid, minimum=torch.rand_like(grid.scale))
    stored = Int8Groups(64).quantize(weight)
    error = (dequantize(stored, 64) - weight.dequantize().double()).abs()
    # Half a step of 254, and what the largest is over 127 steps of a scale rounded down by half of 2**-24 or less.
    step = stored["scale"].double().repeat_interleave(64, dim=1)
    assert torch.all(error <= step / 2 * 1.001 + 127 * 2**-25)


def test_rows_in_groups_are_what_they_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them are rounded at a time."""
    weight = torch.randn(37, 80, generator=torch.Generator().manual_seed(0))
    whole = Int8Groups(32).quantize(weight)
    monkeypatch.setattr(int8_groups, "_ELEMENTS", 5 * 80)
    pieces = Int8Groups(32).quantize(weight)
    assert all(torch.equal(pieces[name], part) for name, part in whole.items())
    alone = Int8Groups(32).quantize(weight[36:])
    assert all(torch.equal(alone[name], part[36:]) for name, part in whole.items())


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("columns", [32, 576, 1536, 50, 7])
def test_int4_rounds_to_half_a_step(group_size: int, columns: int) -> None:
    values = random(16, columns)
    stored = Int4(group_size).quantize(values)
    rounded = int4_matmul.dequantize(stored["codes"], stored["scale"], stored["minimum"], group_size, columns)
    step = stored["scale"].float().repeat_interleave(group_size, dim=1)[:, :columns]
    # Half a step, and what fp16 takes off the ends of the range (11 bits of 15 steps and the minimum).
    assert torch.all((rounded - values).abs() <= step * (0.5 + 16 * 2**-10) + values.abs().max() * 2**-10)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("columns", [32, 576, 50, 7])
def test_int8_groups_round_to_half_a_step(group_size: int, columns: int) -> None:
    values = random(16, columns)
    values[3] = 0
    values[4] = 1e-9  # less than the steps that fp16 has for scales
    stored = Int8Groups(group_size).quantize(values)
    step = stored["scale"].double().repeat_interleave(group_size, dim=1)[:, :columns]
    # Half a step, and what fp16 takes off 127 of them.
    assert torch.all((dequantize(stored, group_size) - values).abs() <= step * (0.5 + 127 * 2**-11) + 1e-9)
    assert not stored["weight"][3:5].any()


@pytest.mark.parametrize("group_size", [-32, 0, 16, 48])
def test_int8_groups_of_other_sizes_are_refused(group_size: int) -> None:
    for scheme in (Int8Groups, Int8WeightOnly):
        with pytest.raises(ConfigError, match="multiples of 32"):
            scheme(group_size)


def test_int8_rounds_to_half_a_step() -> None:
    values = random(16, 100)
    values[3] = 0
    stored = Int8().quantize(values)
    error = stored["weight"].float() * stored["scale"][:, None] - values
    assert torch.all(error.abs() <= stored["scale"][:, None] * 0.5001)
    assert torch.all(stored["weight"][3] == 0)


def activation_step(x: torch.Tensor) -> torch.Tensor:
    """What an int8 product's activations are multiples of, [M, 1] float64."""
    return sparse_reference(x, CPU_ACTIVATIONS)[1].double()


@pytest.mark.parametrize("num_tokens", [1, 3, 17])
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (17, 33), (960, 576), (8, 1536)])
def test_int8_product_equals_its_reference_to_the_bit(num_tokens: int, rows: int, columns: int) -> None:
    stored = Int8().quantize(random(rows, columns))
    x, bias = random(num_tokens, columns, seed=1) * 3, random(rows, seed=2)
    product = Int8().bind(stored, bias)(x)
    assert torch.equal(product, reference(x, CPU_ACTIVATIONS, stored["weight"], stored["scale"], bias))


def test_int8_product_is_close_to_the_float_product() -> None:
    stored = Int8().quantize(random(64, 576))
    weight = stored["weight"].double() * stored["scale"].double()[:, None]
    x = random(9, 576, seed=1)
    x[:, 5] *= 100  # an outlier, the case one int8 term cannot hold
    expected = x.double() @ weight.t()
    bound = activation_step(x) / 2 * weight.abs().sum(dim=1)
    assert torch.all((Int8().bind(stored, None)(x).double() - expected).abs() <= bound * 1.01)


def rounding(scheme: Int8 | Int8Groups | Int8WeightOnly, x: torch.Tensor) -> torch.Tensor:
    """The most that the CPU's product rounds activations [M, K] by, float64."""
    activations = "two-terms" if isinstance(scheme, Int8WeightOnly) else scheme.activations
    largest = x.double().abs()
    match activations:
        case "groups":
            parts = [part.amax(dim=1, keepdim=True).expand_as(part) for part in largest.split(32, dim=1)]
            step = torch.cat(parts, dim=1) / 127
        case "token":
            step = largest.amax(dim=1, keepdim=True) / 127
        case "two-terms":
            step = largest.amax(dim=1, keepdim=True) / (127 * 128)
        case _:
            step = activation_step(x)
    return (step / 2).expand_as(x)


@pytest.mark.parametrize("scheme", INT8, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize(("num_tokens", "columns"), [(1, 576), (9, 300), (17, 33)])
def test_int8_products_are_close_to_those_of_floats(
    scheme: Int8 | Int8Groups | Int8WeightOnly, num_tokens: int, columns: int
) -> None:
    stored, bias = scheme.quantize(random(40, columns)), random(40, seed=2)
    group_size = None if isinstance(scheme, Int8) else scheme.group_size
    weight = dequantize(stored, group_size)
    x = random(num_tokens, columns, seed=1)
    x[:, 5] *= 100
    x[0, 7] = 0.0
    product = scheme.bind(stored, bias)(x)
    bound = rounding(scheme, x) @ weight.abs().t()
    # Float32 sums of a few groups, and products with a rounded inverse of the scale.
    bound = bound * 1.01 + 2**-20 * (x.double().abs() @ weight.abs().t() + bias.abs())
    assert torch.all((product - (x.double() @ weight.t() + bias)).abs() <= bound)


@pytest.mark.parametrize("scheme", INT8, ids=lambda scheme: scheme.name)
def test_int8_rows_are_the_same_alone(scheme: Int8 | Int8Groups | Int8WeightOnly) -> None:
    matmul = scheme.bind(scheme.quantize(random(48, 300)), None)
    x = random(33, 300, seed=2)
    x[4, 3], x[5, 0] = torch.nan, torch.inf
    together = matmul(x)
    assert not together[4:6].isfinite().any()
    for row in (0, 1, 17, 32):
        assert torch.equal(together[row], matmul(x[row : row + 1])[0])


@pytest.mark.parametrize("scheme", INT8, ids=lambda scheme: scheme.name)
def test_random_int8_weights_are_as_announced(scheme: Int8 | Int8Groups | Int8WeightOnly) -> None:
    announced, made = scheme.storage(40, 300), scheme.random(40, 300, torch.device("cpu"))
    assert {key: (t.shape, t.dtype) for key, t in made.items()} == {
        key: (t.shape, t.dtype) for key, t in announced.items()
    }
    product = scheme.bind(made, None)(random(50, 300))
    # Of 2,000 sums of 300 products, the deviation is known to a few per cent.
    assert 0.8 < product.std() < 1.2


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
    # Each activation is off by half a step of its.
    bound = activation_step(x) / 2 * weight.abs().sum(dim=1) + 1e-6
    assert torch.all((scheme.bind(stored, None)(x).double() - expected).abs() <= bound * 1.01)


def test_int4_rows_do_not_depend_on_the_batch() -> None:
    matmul = Int4(32).bind(Int4(32).quantize(random(48, 576)), None)
    x = random(70, 576, seed=2)
    together = matmul(x)
    for row in (0, 1, 33, 69):
        assert torch.equal(together[row], matmul(x[row : row + 1])[0])


def test_nibbles_lie_even_low_odd_high() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x03]]
