"""Round-to-nearest: the textbook's arithmetic element by element, what is kept exactly, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.kernels.matmul import int4 as int4_matmul
from engine.quant.int4 import Int4
from engine.quant.int8 import Int8
from engine.quant.rounding import (
    Ranges,
    fit_grid,
    full_ranges,
    grid_values,
    round_to_grid,
    round_to_nearest,
    round_weight,
)
from engine.quant.weight import GridWeight

KINDS = [(4, True), (4, False), (8, True)]


def textbook(values: list[float], bits: int, symmetric: bool) -> tuple[list[int], float, float]:
    """One group's codes, scale and minimum in double precision, with the scale as fp16 stores it."""
    if symmetric:
        scale = float(np.float16(max(abs(value) for value in values) / (2 ** (bits - 1) - 1)))
        offset = 8 if bits == 4 else 0
        return [round(value / scale) + offset for value in values], scale, -offset * scale
    scale = float(np.float16((max(values) - min(values)) / (2**bits - 1)))
    zero = -round(min(values) / scale)
    codes = [min(max(round(value / scale) + zero, 0), 2**bits - 1) for value in values]
    return codes, scale, float(np.float16(-zero * scale))


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize(
    ("columns", "group_size"), [(64, None), (96, 32), (50, 32), (8, 3), (7, 100), (64, 2)]
)
def test_codes_are_the_textbook_s(bits: int, symmetric: bool, columns: int, group_size: int | None) -> None:
    weight = torch.randn(9, columns)
    rounded = round_to_nearest(weight, bits, group_size, symmetric)
    size = group_size or columns
    assert rounded.group_size == size
    assert rounded.scale.shape == (9, -(-columns // size))
    assert rounded.scale.dtype == torch.float16
    for row in range(9):
        for group in range(rounded.scale.shape[1]):
            span = slice(group * size, min((group + 1) * size, columns))
            codes, scale, minimum = textbook(weight[row, span].tolist(), bits, symmetric)
            assert rounded.codes[row, span].tolist() == codes
            assert rounded.scale[row, group] == scale
            assert (0 if rounded.minimum is None else rounded.minimum[row, group]) == minimum


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_values_are_off_by_half_a_step(bits: int, symmetric: bool) -> None:
    weight = torch.randn(32, 200) * 10.0 ** torch.randint(-3, 3, (32, 1))
    weight[:, 70] *= 30
    rounded = round_to_nearest(weight, bits, 64, symmetric)
    step = rounded.scale.float().repeat_interleave(64, dim=1)[:, :200]
    # fp16 takes up to 2^-11 off the scale, which the outermost code feels `codes` times, and off the minimum.
    codes = 127 if bits == 8 else 15
    # The scales of the smallest rows are so small that fp16 has fewer bits for them.
    subnormal = 2.0**-25 * codes
    assert torch.all((rounded.dequantize() - weight).abs() <= step * (0.5 + 2 * codes * 2**-11) + subnormal)


def test_the_textbook_example() -> None:
    """Seven values in four bits, around zero and from their least to their greatest."""
    x = torch.tensor([[15.0, 25.0, 35.0, 40.0, 50.0, 60.0, 70.0]])
    symmetric = round_to_nearest(x, 4, None, True)
    # 15, 25 and 35 lie halfway between multiples of 70 / 7: half to even. Stored codes are larger by 8.
    assert (symmetric.codes - 8).tolist() == [[2, 2, 4, 4, 5, 6, 7]]
    assert float((symmetric.dequantize() - x).abs().sum()) == 15
    asymmetric = round_to_nearest(x, 4, None, False, scale_dtype=torch.float32)
    assert asymmetric.codes.tolist() == [[0, 3, 6, 7, 10, 12, 15]]
    assert asymmetric.minimum is not None
    assert float(asymmetric.scale) == pytest.approx(55 / 15)
    assert (
        float(-asymmetric.minimum / asymmetric.scale) == -4
    )  # the zero-point: round(15 * 15 / 55) below code 0
    assert float((asymmetric.dequantize() - x).abs().sum()) == pytest.approx(6.0, abs=1e-4)


def test_per_channel_int8_is_the_scheme_s() -> None:
    weight = torch.randn(20, 77)
    weight[4] = 0
    rounded = round_to_nearest(weight, 8, None, True, scale_dtype=torch.float32)
    stored = Int8().quantize(weight)
    assert torch.equal(rounded.codes, stored["weight"])
    assert torch.equal(rounded.scale[:, 0], stored["scale"])
    assert rounded.minimum is None


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_stores_the_grid_as_it_is(symmetric: bool) -> None:
    rounded = round_to_nearest(torch.randn(16, 50), 4, 32, symmetric)
    stored = Int4(32).quantize(rounded)
    kept = int4_matmul.dequantize(stored["codes"], stored["scale"], stored["minimum"], 32, 50)
    assert torch.equal(kept, rounded.dequantize())


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_a_grid_is_kept(bits: int, symmetric: bool) -> None:
    # Powers of two, whose multiples fp16 holds exactly. Each group has both ends of the grid.
    scale = 2.0 ** torch.randint(-8, 3, (12, 3))
    lowest, highest = {(4, True): (-7, 7), (4, False): (-5, 10), (8, True): (-127, 127)}[bits, symmetric]
    steps = torch.randint(lowest, highest + 1, (12, 3, 32))
    steps[:, :, 0], steps[:, :, 31] = lowest, highest
    weight = (steps * scale[:, :, None]).view(12, 96)
    rounded = round_to_nearest(weight, bits, 32, symmetric)
    assert torch.equal(rounded.scale.float(), scale)
    assert torch.equal(rounded.dequantize(), weight)
    again = round_to_nearest(rounded.dequantize(), bits, 32, symmetric)
    assert torch.equal(again.codes, rounded.codes)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("columns", [1, 5, 64])
def test_zeros_stay_zeros(bits: int, symmetric: bool, columns: int) -> None:
    weight = torch.randn(4, columns)
    weight[2] = 0
    values = round_to_nearest(weight, bits, 32, symmetric).dequantize()
    assert torch.equal(values[2], torch.zeros(columns))
    assert torch.all(values[[0, 1, 3]].abs().amax(dim=1) > 0)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("columns", [1, 5, 64])
@pytest.mark.parametrize("value", [3.7, -3.7, 1e-3, -1000.3])
def test_constants_keep_their_value(bits: int, symmetric: bool, columns: int, value: float) -> None:
    values = round_to_nearest(torch.full((3, columns), value), bits, None, symmetric).dequantize()
    # What fp16 takes off the scale: half of 2^-10, or of the smallest step where it is subnormal.
    assert torch.all((values - value).abs() <= max(abs(value) * 2**-11, 127 * 2**-25))


def test_values_too_small_for_fp16_become_zero() -> None:
    weight = torch.randn(2, 32) * 1e-9
    for bits, symmetric in KINDS:
        assert torch.all(round_to_nearest(weight, bits, 32, symmetric).dequantize() == 0)
    assert torch.any(round_to_nearest(weight, 4, 32, True, scale_dtype=torch.float32).dequantize() != 0)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_ranges_cut_what_lies_outside(bits: int, symmetric: bool) -> None:
    weight = torch.randn(8, 64)
    weight[:, 3], weight[:, 40] = 50, -60
    full = full_ranges(weight, 32)
    narrow = Ranges(full.low.clamp(min=-4), full.high.clamp(max=4))
    rounded = round_to_nearest(weight, bits, 32, symmetric, narrow)
    cut = torch.minimum(weight, torch.tensor(4.0)).clamp(min=-4)
    step = rounded.scale.float().repeat_interleave(32, dim=1)
    codes = 127 if bits == 8 else 15
    assert torch.all((rounded.dequantize() - cut).abs() <= step * (0.5 + 2 * codes * 2**-11))
    others = weight.abs() < 4
    plain = round_to_nearest(weight, bits, 32, symmetric).dequantize()
    assert (rounded.dequantize() - weight)[others].square().mean() < (plain - weight)[
        others
    ].square().mean() / 9


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_column_by_column_gives_the_same(bits: int, symmetric: bool) -> None:
    weight = torch.randn(10, 50)
    grid = fit_grid(full_ranges(weight, 16), bits, symmetric)
    together = round_weight(weight, grid, 16)
    values = together.dequantize()
    for column in range(50):
        own = grid.columns(torch.tensor([column // 16]))
        codes = round_to_grid(weight[:, column : column + 1], own)
        assert torch.equal(codes[:, 0], together.codes[:, column])
        assert torch.equal(grid_values(codes, own)[:, 0], values[:, column])


def test_low_precision_weights_are_rounded_as_floats() -> None:
    weight = torch.randn(6, 64).bfloat16()
    rounded, expected = (round_to_nearest(x, 4, 32, False) for x in (weight, weight.float()))
    assert torch.equal(rounded.codes, expected.codes)
    assert isinstance(rounded, GridWeight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = torch.randn(5, 40)
    weight[3, 17] = value
    with pytest.raises(ValueError, match="row 3, column 17"):
        round_to_nearest(weight, 4, 32, False)


def test_what_has_no_grid_is_refused() -> None:
    weight = torch.randn(4, 40)
    with pytest.raises(ValueError, match="no asymmetric grid of 8 bits"):
        round_to_nearest(weight, 8, 32, False)
    with pytest.raises(ValueError, match="no symmetric grid of 3 bits"):
        round_to_nearest(weight, 3, 32, True)
    with pytest.raises(ValueError, match="group size 0"):
        round_to_nearest(weight, 4, 0, True)
    with pytest.raises(ValueError, match=r"shape \[4, 0\]"):
        round_to_nearest(weight[:, :0], 4, 32, True)
    with pytest.raises(ValueError, match=r"shape \[40\]"):
        round_to_nearest(weight[0], 4, 32, True)


def test_what_fp16_cannot_hold_is_refused() -> None:
    weight = torch.randn(4, 40)
    weight[2, 35] = 1e6
    with pytest.raises(ValueError, match=r"group \(2, 1\).*float32"):
        round_to_nearest(weight, 4, 32, True)
    # Scale and minimum fit, together they would not.
    weight[2, 35] = -64_000
    assert round_to_nearest(weight, 4, 32, False).dequantize().isfinite().all()
    # The scale fits, the minimum does not.
    weight[2, 35] = -1e5
    with pytest.raises(ValueError, match=r"group \(2, 1\).*float32"):
        round_to_nearest(weight, 4, 32, False)
    rounded = round_to_nearest(weight, 4, 32, False, scale_dtype=torch.float32)
    assert (rounded.dequantize() - weight)[2, 35].abs() <= rounded.scale[2, 1] * 0.501
