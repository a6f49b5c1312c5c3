"""Checks of the matrix products: against their references, and row by row for every number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.steps import Step, Values, equal, rounding, within
from engine.kernels.launch import Target, target_of, tiles
from engine.kernels.matmul.group_sums_triton import group_sums
from engine.kernels.matmul.group_sums_triton import reference as sums_reference
from engine.kernels.matmul.int4 import Int4Matmul, pack
from engine.kernels.matmul.int4 import dequantize as dequantize_int4
from engine.kernels.matmul.int4_triton import int4_large, int4_segments
from engine.kernels.matmul.int8 import Int8Matmul, int8_matmul
from engine.kernels.matmul.int8 import reference as int8_reference
from engine.kernels.matmul.segments_triton import new_counters
from engine.kernels.matmul.weight_only import GroupSize, WeightOnlyMatmul
from engine.kernels.matmul.weight_only import dequantize as dequantize_int8
from engine.kernels.matmul.weight_only_triton import weight_only_matmul
from engine.kernels.operands import Int8Activations, Int8Format
from engine.kernels.quantize import quantize_per_token

FORMATS = [Int8Format(terms, group) for terms in (1, 2) for group in (None, 32, 64, 128)]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the checks run with.

    Attributes:
        even, odd: (N, K): in whole tiles and of several segments; with tails.
        exact: (N, K) of products whose reference is computed in int64, on the CPU.
        tokens: Numbers of tokens of the even shape, one for each tile and form.
        odd_tokens: Those of the odd and the exact shape.
        batches: Numbers of tokens whose rows are compared, ascending.
    """

    device: torch.device
    even: tuple[int, int] = (4096, 4096)
    odd: tuple[int, int] = (1000, 2144)
    exact: tuple[int, int] = (136, 2400)
    tokens: Sequence[int] = (1, 16, 24, 50, 100, 300, 1100)
    odd_tokens: Sequence[int] = (3, 200)
    batches: Sequence[int] = (1, 2, 7, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025, 4096)


Int4Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def int4_weight(shape: tuple[int, int], group_size: int, device: torch.device) -> Int4Weight:
    """Random codes, scale and minimum of a weight [N, K] whose products deviate about as much as their input."""
    rows, columns = shape
    codes = torch.randint(0, 256, (rows, (columns + 1) // 2), dtype=torch.uint8, device=device)
    groups = (rows, -(-columns // group_size))
    scale = ((0.5 + torch.rand(groups, device=device)) * columns**-0.5 / 4.6).half()
    return codes, scale, (-7.5 * scale * (0.8 + 0.4 * torch.rand(groups, device=device))).half()


def int8_weight(
    shape: tuple[int, int], group_size: GroupSize, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and scale of a weight [N, K]."""
    rows, columns = shape
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    groups = (rows,) if group_size is None else (rows, -(-columns // group_size))
    return codes, (0.5 + torch.rand(groups, device=device)) * columns**-0.5 / 73


def tokens(count: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random activations [count, columns]."""
    return torch.randn(count, columns, device=device).to(dtype)


def check_product(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    magnitude: torch.Tensor,
    lost: float,
) -> Values:
    """Asserts y = x weightᵀ + bias but for rounding.

    K products and what joins them round to 2^-24 of at most the sum of magnitudes each, and `lost` of it is
    lost beside that; the result rounds once to its type.

    Args:
        magnitude: [N, K], at least |weight|.
    """
    expected = x.double() @ weight.double().t() + bias
    largest = x.double().abs() @ magnitude.double().t() + bias.abs()
    bound = (lost + (x.shape[1] + 100) * 2**-24) * largest
    assert y.dtype == x.dtype
    return within(y, expected, bound + rounding(y.dtype) * (expected.abs() + bound) + 1e-30)


def _int4(
    shape: tuple[int, int], counts: Sequence[int], group: int, dtype: torch.dtype, sizes: Sizes
) -> Values:
    device, (rows, columns) = sizes.device, shape
    parts = int4_weight(shape, group, device)
    bias = torch.randn(rows, device=device)
    weight = dequantize_int4(*parts, group, columns)
    codes, scale, minimum = parts
    # Codes and minimums are summed apart.
    magnitude = dequantize_int4(codes, scale, minimum.abs(), group, columns)
    packed, counters = pack(*parts, group), new_counters(rows, device)
    chosen = {
        batch_invariant: Int4Matmul(*parts, group, bias, batch_invariant) for batch_invariant in (False, True)
    }
    errors = []
    for count in counts:
        x = tokens(count, columns, dtype, device)
        segments = int4_segments(group_sums(x), packed, bias, counters)
        errors.append(check_product(segments, x, weight, bias, magnitude, 0.0))
        # Each weight is rounded to x's type.
        large = int4_large(x, packed, bias)
        errors.append(check_product(large, x, weight, bias, magnitude, rounding(dtype)))
        equal(chosen[True](x), segments, f"the batch-invariant form of {count} tokens")
        y = chosen[False](x)
        assert torch.equal(y, segments) or torch.equal(y, large), (
            f"{count} tokens: the result of neither form"
        )
        assert not counters.any(), "counters are not zero after the launch"
    return {"error": max(error["error"] for error in errors)}


def _int8(format: Int8Format, dtype: torch.dtype, counts: Sequence[int], sizes: Sizes) -> Values:
    """Equal to the reference to the bit, codes and scales of the activations too."""
    rows, columns = sizes.exact
    for weight_group in {None, format.group_size}:
        weight, scale = int8_weight(sizes.exact, weight_group, sizes.device)
        bias = torch.randn(rows, device=sizes.device)
        matmul = Int8Matmul(weight, scale, bias, format)
        for count in counts:
            x = tokens(count, columns, dtype, sizes.device)
            terms = quantize_per_token(x, format)
            on_cpu = Int8Activations(
                terms.high.cpu(), None if terms.low is None else terms.low.cpu(), terms.scale.cpu(), dtype
            )
            expected = int8_reference(on_cpu, weight.cpu(), scale.cpu(), bias.cpu(), format.group_size)
            equal(matmul(terms), expected, f"{count} tokens")
            equal(matmul(x), expected, f"{count} tokens, as floats")
    return {}


def _weight_only(is_int8: bool, group: GroupSize, dtype: torch.dtype, sizes: Sizes) -> Values:
    errors = []
    for shape, counts in ((sizes.even, sizes.tokens), (sizes.odd, sizes.odd_tokens)):
        rows, columns = shape
        bias = torch.randn(rows, device=sizes.device)
        if is_int8:
            codes, scale = int8_weight(shape, group, sizes.device)
            weight, matmul = dequantize_int8(codes, scale, group), WeightOnlyMatmul(codes, scale, group, bias)
        else:
            weight = tokens(rows, columns, dtype, sizes.device) * columns**-0.5
            matmul = WeightOnlyMatmul(weight, None, None, bias)
        for count in counts:
            x = tokens(count, columns, dtype, sizes.device)
            errors.append(check_product(matmul(x), x, weight, bias, weight.abs(), 0.0)["error"])
    return {"error": max(errors)}


def _group_sums(dtype: torch.dtype, sizes: Sizes) -> Values:
    x = tokens(17, sizes.odd[1] + 3, dtype, sizes.device)
    magnitude = sums_reference(x.abs()).double()
    # Five additions, in the one and in the other order.
    return within(group_sums(x).sums, sums_reference(x), 10 * 2**-24 * magnitude + 1e-30)


def check_rows(
    product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, batches: Sequence[int]
) -> Values:
    """Asserts that the first rows do not depend on how many follow, nor any on its place in a batch."""
    together = product(x[: batches[-1]])
    for count in batches:
        equal(product(x[:count]), together[:count], f"{count} tokens of {batches[-1]}")
    for row in (batches[-1] // 2, batches[-1] - 1):
        last = min(row + batches[0], batches[-1])
        equal(product(x[row:last]), together[row:last], f"token {row} first in its batch")
    return {}


def _target(sizes: Sizes) -> Target:
    target = target_of(torch.empty(0, device=sizes.device))
    assert target is not None
    return target


def _int8_rows(format: Int8Format, sizes: Sizes) -> Values:
    """Every number of tokens, and every tile, to the bit."""
    weight, scale = int8_weight(sizes.even, None, sizes.device)
    x = tokens(sizes.batches[-1], sizes.even[1], torch.bfloat16, sizes.device)
    matmul = Int8Matmul(weight, scale, None, format)
    check_rows(matmul, x, sizes.batches)
    operation = "int8_matmul" if format.terms == 1 else "int8_matmul_two_terms"
    operation = "int8_matmul_grouped" if format.group_size else operation
    few = x[: sizes.batches[len(sizes.batches) // 2]]
    terms, expected = quantize_per_token(few, format), matmul(few)
    for tile in tiles(_target(sizes), operation):
        y = int8_matmul(terms, weight, scale, None, format.group_size, tile=tile)
        equal(y, expected, f"tile {dict(tile.sizes)}")
    return {}


def _int4_rows(group: int, form: str, dtype: torch.dtype, sizes: Sizes) -> Values:
    """Within a form: every number of tokens, every tile, every number of programs."""
    parts = int4_weight(sizes.even, group, sizes.device)
    packed, counters = pack(*parts, group), new_counters(sizes.even[0], sizes.device)
    x = tokens(sizes.batches[-1], sizes.even[1], dtype, sizes.device)
    if form == "large":
        batches = [count for count in sizes.batches if count > 16]
        check_rows(lambda rows: int4_large(rows, packed, None), x, batches)
        some = x[: batches[0]]
        for tile in tiles(_target(sizes), "int4_matmul.large"):
            equal(
                int4_large(some, packed, None, tile),
                int4_large(some, packed, None),
                f"tile {dict(tile.sizes)}",
            )
        return {}
    check_rows(Int4Matmul(*parts, group, None, batch_invariant=True), x, sizes.batches)
    few = group_sums(x[: sizes.batches[len(sizes.batches) // 2]])
    expected = int4_segments(few, packed, None, counters)
    for tile in tiles(_target(sizes), "int4_matmul.segments"):
        for programs in (1, 2, None):
            y = int4_segments(few, packed, None, counters, tile, programs)
            equal(y, expected, f"tile {dict(tile.sizes)}, {programs} segments a program")
    return {}


def _weight_only_rows(is_int8: bool, dtype: torch.dtype, sizes: Sizes) -> Values:
    codes, scale = int8_weight(sizes.even, None, sizes.device)
    weight = codes if is_int8 else codes.to(dtype)
    x = tokens(sizes.batches[-1], sizes.even[1], dtype, sizes.device)
    check_rows(WeightOnlyMatmul(weight, scale if is_int8 else None), x, sizes.batches)
    few, counters = x[:3], new_counters(sizes.even[0], sizes.device)
    arguments = (few, weight, scale if is_int8 else None, None, None, counters)
    for tile in tiles(_target(sizes), "weight_only_matmul" if is_int8 else "weight_only_matmul.float"):
        for programs in (1, 2, None):
            y = weight_only_matmul(*arguments, tile, programs)
            equal(
                y, weight_only_matmul(*arguments), f"tile {dict(tile.sizes)}, {programs} segments a program"
            )
    return {}


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def int4_steps(dtype: torch.dtype, sizes: Sizes) -> list[Step]:
    """Both forms and the batch-invariant one, in groups of 32, 64 and 128."""
    rows = [
        Step("int4 rows", f"{form} g128 {_name(dtype)}", partial(_int4_rows, 128, form, dtype, sizes))
        for form in ("segments", "large")
    ]
    return [
        Step(
            "int4_matmul",
            f"g{group} {kind} {_name(dtype)}",
            partial(_int4, shape, counts, group, dtype, sizes),
        )
        for kind, shape, counts in (("even", sizes.even, sizes.tokens), ("odd", sizes.odd, sizes.odd_tokens))
        for group in (128, 32, 64)
    ] + rows


def int8_steps(dtype: torch.dtype, sizes: Sizes) -> list[Step]:
    """Every format; the rows of those that the engine uses or is to choose from."""
    counts = sizes.tokens if dtype == torch.bfloat16 else sizes.odd_tokens
    steps = [
        Step("int8_matmul", f"{format} {_name(dtype)}", partial(_int8, format, dtype, counts, sizes))
        for format in FORMATS
    ]
    if dtype == torch.bfloat16:
        steps += [
            Step("int8 rows", str(format), partial(_int8_rows, format, sizes))
            for format in FORMATS
            if format.group_size in (None, 128)
        ]
    return steps


def weight_only_steps(sizes: Sizes) -> list[Step]:
    """int8 weights with and without groups, and floats."""
    steps = []
    for dtype in (torch.bfloat16, torch.float16):
        kinds: list[tuple[str, bool, GroupSize]] = [
            ("int8", True, None),
            ("int8 g128", True, 128),
            ("float", False, None),
        ]
        steps += [
            Step(
                "weight_only_matmul",
                f"{kind} {_name(dtype)}",
                partial(_weight_only, is_int8, group, dtype, sizes),
            )
            for kind, is_int8, group in kinds
        ]
        steps.append(Step("group_sums", _name(dtype), partial(_group_sums, dtype, sizes)))
    return steps + [
        Step("weight-only rows", kind, partial(_weight_only_rows, is_int8, torch.bfloat16, sizes))
        for kind, is_int8 in (("int8", True), ("float", False))
    ]
