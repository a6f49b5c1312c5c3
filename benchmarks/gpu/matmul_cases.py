"""Timed matrix products beside cuBLAS and torch's quantized ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.cases import Case, products
from benchmarks.gpu.matmuls import int4_weight, int8_weight, tokens
from benchmarks.gpu.timing import Call, num_copies
from engine.kernels.matmul.group_sums_triton import reference as sums_reference
from engine.kernels.matmul.int4 import Int4Matmul
from engine.kernels.matmul.int8 import Int8Matmul
from engine.kernels.matmul.weight_only import WeightOnlyMatmul
from engine.kernels.operands import GroupSums, Int8Activations, Int8Format
from engine.kernels.quantize import quantize_per_token

BF16 = torch.bfloat16


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _apply(matmul: Callable[[Any], Any], x: Any) -> Any:
    return matmul(x)


def _int_mm(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(x, weight.t())


def _inputs(count: int, columns: int, device: torch.device) -> list[torch.Tensor]:
    return [tokens(count, columns, BF16, device) for _ in range(2)]


def _float_weights(shape: tuple[int, int], device: torch.device) -> list[torch.Tensor]:
    copies = num_copies(2 * shape[0] * shape[1], device)
    return [torch.randn(shape, dtype=BF16, device=device) * shape[1] ** -0.5 for _ in range(copies)]


def _tinygemm_weights(
    shape: tuple[int, int], copies: int, device: torch.device
) -> list[tuple[torch.Tensor, ...]]:
    rows, columns = shape
    weights: list[tuple[torch.Tensor, ...]] = []
    for _ in range(copies):
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=device)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        weights.append((packed, torch.rand(columns // 128, rows, 2, dtype=BF16, device=device)))
    return weights


def _tinygemm(weight: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, weight[0], 128, weight[1])


def _tinygemm_calls(shape: tuple[int, int], x: Sequence[torch.Tensor], copies: int) -> Sequence[Call]:
    return products(_tinygemm, _tinygemm_weights(shape, copies, x[0].device), x)()


def int4_cases(
    shape: tuple[int, int], counts: Sequence[int], device: torch.device, has_tinygemm: bool = False
) -> list[Case]:
    """int4 in groups of 128, as the engine calls it: its norm has written the sums."""
    rows, columns = shape
    weight_bytes = rows * columns // 2 + 4 * rows * columns // 128
    copies = num_copies(weight_bytes, device)
    parts = [int4_weight(shape, 128, device) for _ in range(copies)]
    ours = [Int4Matmul(*part, 128) for part in parts]
    batch_invariant = [Int4Matmul(*part, 128, None, True) for part in parts]
    floats = _float_weights(shape, device)
    cases = []
    for count in counts:
        x = _inputs(count, columns, device)
        sums = [GroupSums(rows, sums_reference(rows)) for rows in x]
        calls = {
            "ours": products(_apply, ours, sums),
            "cuBLAS": products(_linear, floats, x),
        }
        if count > 128:
            calls["batch_invariant"] = products(_apply, batch_invariant, sums)
        if has_tinygemm:
            calls["tinygemm"] = partial(_tinygemm_calls, shape, x, copies)
        size = weight_bytes + count * (2 * columns + columns // 8 + 2 * rows)
        cases.append(Case(count, size, 2 * count * rows * columns, calls))
    return cases


def int8_cases(
    shape: tuple[int, int], format: Int8Format, counts: Sequence[int], device: torch.device
) -> list[Case]:
    """int8 × int8 with the activations' terms ready, as a norm writes them."""
    rows, columns = shape
    copies = num_copies(rows * columns, device)
    weights = [int8_weight(shape, None, device) for _ in range(copies)]
    ours = [Int8Matmul(codes, scale, None, format) for codes, scale in weights]
    floats = _float_weights(shape, device)
    cases = []
    for count in counts:
        x = _inputs(count, columns, device)
        terms = [quantize_per_token(rows, format) for rows in x]
        high = [_codes(part) for part in terms]
        calls = {
            "ours": products(_apply, ours, terms),
            "cuBLAS": products(_linear, floats, x),
            "int_mm": products(_int_mm, [weight for weight, _ in weights], high),
        }
        if count <= 16:
            del calls["int_mm"]  # takes more than 16 rows only
        size = rows * columns + count * (format.terms * columns + 2 * rows)
        cases.append(Case(count, size, 2 * format.terms * count * rows * columns, calls, "int8"))
    return cases


def _codes(terms: Int8Activations) -> torch.Tensor:
    return terms.high.contiguous()


def weight_only_cases(
    shape: tuple[int, int], is_int8: bool, counts: Sequence[int], device: torch.device
) -> list[Case]:
    """Float activations × int8 weights, or × floats in the one form that --deterministic pins."""
    rows, columns = shape
    floats = _float_weights(shape, device)
    if is_int8:
        copies = num_copies(rows * columns, device)
        pairs = [int8_weight(shape, None, device) for _ in range(copies)]
        ours = [WeightOnlyMatmul(codes, scale) for codes, scale in pairs]
    else:
        ours = [WeightOnlyMatmul(weight) for weight in floats]
    cases = []
    for count in counts:
        x = _inputs(count, columns, device)
        calls = {"ours": products(_apply, ours, x), "cuBLAS": products(_linear, floats, x)}
        size = (1 if is_int8 else 2) * rows * columns + 2 * count * (columns + rows)
        cases.append(Case(count, size, 2 * count * rows * columns, calls))
    return cases
