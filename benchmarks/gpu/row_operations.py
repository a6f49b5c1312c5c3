"""Checks of what is computed a token at a time: norms, activations, quantization, embedding, rotary and cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.gpu.matmuls import check_rows, tokens
from benchmarks.gpu.paged import Heads, make_layer
from benchmarks.gpu.steps import Step, Values, equal, rounding, within
from engine.kernels import embedding, quantize
from engine.kernels.activation import gelu_mul, silu_mul
from engine.kernels.attention.kv_layer import KVLayer
from engine.kernels.norm import rms_norm
from engine.kernels.operands import Activations, Format, GroupSums, Int8Activations, Int8Format, SumsFormat
from engine.kernels.rotary import reference as rotary_reference
from engine.kernels.rotary import rotate_and_write

FORMATS: list[Format] = [
    SumsFormat(),
    *(Int8Format(terms, group) for terms in (1, 2) for group in (None, 32, 64, 128)),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CACHE_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}

FormattedOperation = Callable[[torch.Tensor, Format], Activations]


def _check_format(actual: Activations, floats: torch.Tensor, format: Format) -> None:
    """A format holds the rounded result of the operation without one: its codes, to the bit, or its sums."""
    if isinstance(actual, GroupSums):
        equal(actual.values, floats, "values beside sums")
        sums = F.pad(floats.float(), (0, -floats.shape[1] % 32))
        for _ in range(5):  # neighbours first
            sums = sums[:, 0::2] + sums[:, 1::2]
        equal(actual.sums, sums, "sums")
        return
    assert isinstance(actual, Int8Activations)
    assert isinstance(format, Int8Format)
    expected = quantize.reference(floats.cpu(), format)
    equal(actual.scale, expected.scale, f"{format}: scale")
    equal(actual.high, expected.high, f"{format}: high")
    if expected.low is not None:
        assert actual.low is not None
        equal(actual.low, expected.low, f"{format}: low")


def _formats(operation: FormattedOperation, x: torch.Tensor) -> None:
    floats = operation(x, None)
    assert isinstance(floats, torch.Tensor)
    for format in FORMATS:
        _check_format(operation(x, format), floats, format)


def _norm(dtype: torch.dtype, size: int, device: torch.device) -> Values:
    x, weight = tokens(17, size, dtype, device) * 3, tokens(1, size, dtype, device)[0]
    values = x.double()
    expected = values * torch.rsqrt(values.square().mean(dim=1, keepdim=True) + 1e-5) * weight.double()
    # A float32 sum of `size` squares, a root, a quotient and two products.
    bound = (rounding(dtype) + (size + 10) * 2**-24) * expected.abs() + torch.finfo(dtype).tiny

    def norm(x: torch.Tensor, format: Format) -> Activations:
        return rms_norm(x, weight, 1e-5, format)

    y = norm(x, None)
    assert isinstance(y, torch.Tensor)
    errors = within(y, expected, bound)
    _formats(norm, x)
    delta, added = tokens(17, size, dtype, device), x.clone()
    fused = rms_norm(added, weight, 1e-5, None, delta)
    assert isinstance(fused, torch.Tensor)
    equal(added, x + delta, "the residual's sum")
    plain = norm(x + delta, None)
    assert isinstance(plain, torch.Tensor)
    equal(fused, plain, "the norm of the residual's sum")
    check_rows(lambda rows: rms_norm(rows, weight, 1e-5), x, (1, 3, 17))  # type: ignore[arg-type, return-value]
    return errors


def _gated(kind: str, dtype: torch.dtype, size: int, device: torch.device) -> Values:
    x = tokens(17, 2 * size, dtype, device) * 3
    gate, up = x.double().chunk(2, dim=1)
    operation = {"silu": silu_mul, "gelu": gelu_mul}[kind]
    expected = (F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")) * up
    y = operation(x)
    assert isinstance(y, torch.Tensor)
    # The float32 exponential of u is off by |u| 2^-24 and a few roundings, and |u| is a few hundred at most.
    errors = within(y, expected, (rounding(dtype) + 2**-14) * expected.abs() + 1e-6)
    _formats(operation, x)
    return errors


def _quantize(dtype: torch.dtype, size: int, device: torch.device) -> Values:
    x = tokens(17, size, dtype, device)
    x[3] = 0
    x[5] *= 1e-4
    for format in FORMATS:
        if isinstance(format, Int8Format):
            _check_format(quantize.quantize_per_token(x, format), x, format)
    x[1, 2] = torch.inf
    assert quantize.quantize_per_token(x, Int8Format(2)).scale[1].isnan().all(), "an infinity does not show"
    return {}


def _embedding(dtype: torch.dtype, size: int, device: torch.device) -> Values:
    ids = torch.randint(0, 100, (33,), device=device, dtype=torch.int32)
    table = tokens(100, size, dtype, device)
    floats = embedding.reference(ids, table, None, None, dtype)
    equal(embedding.lookup(ids, table, None, None, dtype), floats, "floats")
    codes = torch.randint(-127, 128, (100, size), dtype=torch.int8, device=device)
    scale = torch.rand(100, -(-size // 32), device=device).half()
    expected = embedding.reference(ids, codes, scale, 32, dtype)
    equal(embedding.lookup(ids, codes, scale, 32, dtype), expected, "int8")
    return {}


def _rotary(heads: Heads, has_norm: bool, device: torch.device) -> Values:
    num_tokens, dtype = 17, heads.dtype
    total = heads.num_heads + 2 * heads.num_kv_heads
    x = torch.randn(num_tokens, total, heads.head_dim, device=device).to(dtype)
    x[0, heads.num_heads] = 0  # a key of zeros
    positions = torch.randint(0, 50, (num_tokens,), device=device, dtype=torch.int32)
    angles = torch.rand(50, heads.head_dim // 2, device=device) * 6
    slots = (torch.randperm(60, device=device)[:num_tokens] + 16).to(torch.int32)
    norms = (0.5 + torch.rand(2, heads.head_dim, device=device)).to(dtype)
    query_norm, key_norm = (norms[0], norms[1]) if has_norm else (None, None)
    layers = [make_layer(5, heads, device, is_filled=True) for _ in range(2)]
    if layers[0].scales is not None and layers[1].scales is not None:
        layers[1].scales.copy_(layers[0].scales)
    layers[1].data.copy_(layers[0].data)
    arguments = (x, positions, angles.cos(), angles.sin())
    actual, expected = (
        function(*arguments, layer, slots, heads.num_kv_heads, query_norm, key_norm, 1e-6)
        for function, layer in zip((rotate_and_write, rotary_reference), layers, strict=True)
    )
    # An element is a difference of two products of the vector's elements.
    largest = expected.float().abs().amax(-1, keepdim=True)
    errors = [within(actual, expected, 4 * rounding(dtype) * largest + 1e-30)["error"]]
    errors.append(_check_cache(layers[0], layers[1], slots, 4 * rounding(dtype)))
    return {"error": max(errors)}


def _check_cache(actual: KVLayer, expected: KVLayer, slots: torch.Tensor, step: float) -> float:
    """Keys and values alike in the slots, and nothing written elsewhere; the error as a share of its bound."""
    written = torch.zeros(actual.data.shape[1] * actual.block_size, dtype=torch.bool, device=slots.device)
    written[slots.long()] = True
    mine, theirs = (layer.data.flatten(1, 2)[:, ~written].float() for layer in (actual, expected))
    equal(mine, theirs, "slots of others")
    errors = []
    for mine, theirs in zip(actual.read(slots.long()), expected.read(slots.long()), strict=True):
        largest = theirs.abs().amax(-1, keepdim=True)
        if actual.data.dtype == torch.int8:
            # A code may be the neighbour where the value before it differs by a rounding.
            bound = (1.01 / 127 + 2 * step) * largest
        elif actual.data.dtype == torch.float8_e4m3fn:
            bound = 2**-3 * theirs.abs() + (2**-9 + 2 * step) * largest
        else:
            bound = (step + 4 * rounding(actual.data.dtype)) * largest
        errors.append(within(mine, theirs, bound + 1e-30)["error"])
    return max(errors)


def row_steps(
    device: torch.device,
    sizes: tuple[int, ...] = (4096, 576),
    heads: int = 32,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
    cache_dtypes: Mapping[str, torch.dtype] = CACHE_DTYPES,
) -> list[Step]:
    """Every operation with every format.

    Args:
        sizes: Elements of a token.
        heads: Query heads, of which four share a key head.
    """
    steps = []
    for name, dtype in dtypes.items():
        for size in sizes:
            how = (dtype, size, device)
            steps += [
                Step("rms_norm", f"{name} {size}", partial(_norm, *how)),
                Step("silu_mul", f"{name} {size}", partial(_gated, "silu", *how)),
                Step("gelu_mul", f"{name} {size}", partial(_gated, "gelu", *how)),
                Step("quantize_per_token", f"{name} {size}", partial(_quantize, *how)),
                Step("embedding", f"{name} {size}", partial(_embedding, *how)),
            ]
        for cache, cache_dtype in cache_dtypes.items():
            for head_dim, has_norm in ((128, False), (80, True)):
                shape = Heads(heads, heads // 4, head_dim, dtype, cache_dtype)
                text = f"{name}, cache {cache}, head {head_dim}"
                steps.append(Step("rotate_and_write", text, partial(_rotary, shape, has_norm, device)))
    return steps
