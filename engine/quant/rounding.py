"""Round-to-nearest: a weight on a grid of evenly spaced values, a scale and a zero-point for each group along K.

    symmetric    scale = max(|low|, |high|) / (2^(bits - 1) - 1)      code = round(w / scale) + offset
    asymmetric   scale = (high - low) / (2^bits - 1)                  code = round(w / scale) - round(low / scale)

The range [low, high] is the group's minimum and maximum, or a narrower one (`engine.compression.clipping`): what lies
outside gets the outermost code. Finding the grid and rounding to it are separate functions, so that an algorithm
which changes the values between the two (GPTQ) uses the same arithmetic.

Source: "absmax" and "zeropoint" quantization in Dettmers et al. 2022, "LLM.int8()", section 2.1 (arXiv:2208.07339).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.quant.weight import GridWeight

# The lowest and highest code by (bits, symmetric). Four bits are stored without a sign, the symmetric ones with
# the offset 8; the code that has no counterpart of the other sign stays unused.
_CODES = {(4, True): (1, 15), (4, False): (0, 15), (8, True): (-127, 127)}


@dataclass(frozen=True, slots=True)
class Ranges:
    """What each group's grid has to span.

    Attributes:
        low: [N, groups] float.
        high: Like `low`, nowhere below it.
    """

    low: torch.Tensor
    high: torch.Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """Grids of the values ``(code - zero) * scale`` for codes from `lowest` to `highest`.

    Attributes:
        scale: [N, groups] of the dtype it is stored in, positive.
        zero: [N, groups] float32, whole numbers: the code of the value 0, which may lie outside the codes.
        lowest: Negative where codes are int8, else they are uint8.
        highest: The largest code.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    lowest: int
    highest: int

    @property
    def minimum(self) -> torch.Tensor | None:
        """The value of code 0 as stored, like `scale`; None where it is 0 in all groups by construction.

        -zero * scale is rounded to the scale's dtype: in fp16 it is off by up to |zero| / 2048 steps, which is
        nothing for groups with values of both signs, and as exact as fp16 can be for the others.
        """
        if self.lowest < 0:
            return None
        return (-self.zero * self.scale.float()).to(self.scale.dtype)

    def columns(self, groups: torch.Tensor) -> Grid:
        """The grids of single columns: groups [C] int64, the group of each → a grid of [N, C]."""
        return Grid(self.scale[:, groups], self.zero[:, groups], self.lowest, self.highest)


def full_ranges(weight: torch.Tensor, group_size: int | None) -> Ranges:
    """Each group's minimum and maximum: nothing is clipped.

    Args:
        weight: [N, K] float.
        group_size: Columns that share a range, the last group may be shorter; None is the whole row.

    Raises:
        ValueError: The weight is no matrix, has no elements or one that is not finite; or no group size.
    """
    require_finite(weight)
    pieces = group_pieces(weight.float(), group_size)
    return Ranges(
        torch.cat([piece.amin(dim=2) for piece in pieces], dim=1),
        torch.cat([piece.amax(dim=2) for piece in pieces], dim=1),
    )


def fit_grid(
    ranges: Ranges,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
    keeps_zero: bool = False,
) -> Grid:
    """The grid that spans each range, found with the scale as it is stored.

    A range without extent is widened to reach 0, which keeps its value; one of zeros gets the scale 1.

    Args:
        ranges: Of any shape.
        bits: 4 or 8; 8 only symmetric, as int8 codes.
        symmetric: Absmax, -high … high with as many values on both sides of 0; else zero-point, low … high.
        keeps_zero: Code `zero` stands for 0 to the last bit, as stored; for ranges that hold 0.

    Raises:
        ValueError: No such grid, or a range whose scale or minimum is beyond `scale_dtype`.
    """
    if (bits, symmetric) not in _CODES:
        kind = "symmetric" if symmetric else "asymmetric"
        raise ValueError(f"no {kind} grid of {bits} bits: use 4 bits, or 8 bits and symmetric")
    lowest, highest = _CODES[bits, symmetric]
    low, high = ranges.low.float(), ranges.high.float()
    if symmetric:
        middle = (lowest + highest) // 2
        scale = (torch.maximum(low.abs(), high.abs()) / (highest - middle)).to(scale_dtype)
        scale = torch.where(scale == 0, 1.0, scale)
        zero = torch.full_like(scale, middle, dtype=torch.float32)
    else:
        flat = ((high - low) / (highest - lowest)).to(scale_dtype) == 0
        low = torch.where(flat, low.clamp(max=0), low)
        high = torch.where(flat, high.clamp(min=0), high)
        scale = ((high - low) / (highest - lowest)).to(scale_dtype)
        scale = torch.where(scale == 0, 1.0, scale)
        if keeps_zero:
            scale = _with_short_mantissa(scale)
        zero = -(low / scale.float()).round()
    grid = Grid(scale, zero, lowest, highest)
    stored = scale.isfinite()
    if grid.minimum is not None:
        stored &= grid.minimum.isfinite()
    if not bool(stored.all()):
        place = tuple((~stored).nonzero()[0].tolist())
        raise ValueError(
            f"group {place}: the range {float(ranges.low[place]):g} to {float(ranges.high[place]):g} needs more "
            f"than {scale_dtype} holds: use float32 scales"
        )
    return grid


def _with_short_mantissa(scale: torch.Tensor) -> torch.Tensor:
    """The next scale from here on whose mantissa has seven bits.

    Its product with a zero-point of four bits has eleven, which fp16 holds: no minimum is rounded.
    """
    mantissa, exponent = torch.frexp(scale.float())
    return torch.ldexp((mantissa * 128).ceil() / 128, exponent).to(scale.dtype)


def round_to_grid(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The codes of values: float of a shape that `grid.scale` broadcasts to → uint8 or int8 of that shape.

    Values must be finite; a value at the same distance from two takes the even multiple of the scale.
    """
    codes = (values / grid.scale.float()).round_().add_(grid.zero).clamp_(grid.lowest, grid.highest)
    return codes.to(torch.int8 if grid.lowest < 0 else torch.uint8)


def nearest_codes(
    values: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: int
) -> torch.Tensor:
    """The nearest codes 0..levels - 1 of grids whose minimum is any float, as floats of the values' dtype.

    Shapes broadcast; where the scale is zero any code will do. A `Grid` has a whole zero instead, so that the value 0
    stays 0 and formats with integer zero-points hold it exactly.
    """
    return ((values - minimum) / torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, levels - 1)


def grid_values(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The values of codes as the stored grid gives them, float32: what `GridWeight.dequantize` returns."""
    values = codes.float() * grid.scale.float()
    minimum = grid.minimum
    return values if minimum is None else values.add_(minimum.float())


def round_weight(weight: torch.Tensor, grid: Grid, group_size: int | None) -> GridWeight:
    """A weight [N, K] rounded to the grids of its groups.

    Args:
        grid: Of [N, ceil(K / group_size)].

    Raises:
        ValueError: As `full_ranges`.
    """
    require_finite(weight)
    columns = weight.shape[1]
    size = columns if group_size is None else group_size
    groups = torch.arange(columns, device=weight.device) // size
    codes = round_to_grid(weight.float(), grid.columns(groups))
    return GridWeight(codes, grid.scale, grid.minimum, size)


def round_to_nearest(
    weight: torch.Tensor,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    ranges: Ranges | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> GridWeight:
    """A weight on the grids that span its ranges.

    Args:
        weight: [N, K] float, any K.
        bits: 4 (uint8 codes of 0..15) or 8 (int8 codes of -127..127, symmetric).
        group_size: Columns that share a grid, the last group may be shorter; None is the whole row.
        ranges: [N, ceil(K / group_size)]; None is each group's minimum and maximum.

    Raises:
        ValueError: As `full_ranges` and `fit_grid`.
    """
    if ranges is None:
        ranges = full_ranges(weight, group_size)
    return round_weight(weight, fit_grid(ranges, bits, symmetric, scale_dtype), group_size)


def group_pieces(weight: torch.Tensor, group_size: int | None) -> list[torch.Tensor]:
    """Views of [N, K] as groups: [N, K // group_size, group_size], and [N, 1, rest] where there is a rest.

    Raises:
        ValueError: `group_size` is below 1.
    """
    columns = weight.shape[1]
    size = columns if group_size is None else group_size
    if size < 1:
        raise ValueError(f"group size {size}: must be at least 1")
    whole = columns - columns % size
    pieces = [weight[:, :whole].view(len(weight), -1, size)] if whole else []
    return pieces if whole == columns else [*pieces, weight[:, None, whole:]]


def require_finite(weight: torch.Tensor) -> None:
    """Refuse what has no grid.

    Raises:
        ValueError: The weight is no matrix, has no elements, or one that is not finite; says where.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"a weight of shape {list(weight.shape)}: must be a matrix with elements")
    finite = weight.isfinite()
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(f"row {row}, column {column}: {float(weight[row, column])} cannot be quantized")


def require_importance(importance: torch.Tensor, columns: int) -> None:
    """Refuse an importance that is not one finite number of at least 0 for each column, some above 0.

    Raises:
        ValueError: Says what is wrong, and where.
    """
    if importance.shape != (columns,):
        raise ValueError(f"an importance of shape {list(importance.shape)}: must be [{columns}]")
    wrong = ~(importance.isfinite() & (importance >= 0))
    if bool(wrong.any()):
        column = int(wrong.nonzero()[0])
        raise ValueError(f"column {column}: the importance {float(importance[column])} must be at least 0")
    if not bool((importance > 0).any()):
        raise ValueError("an importance of zeros: leave it out to weigh all columns alike")
