"""exp and log in float32 whose every operation is rounded once, so that C and torch give the same bits.

A library's exp differs from machine to machine, and so would what is drawn. Neither fuses a product with a sum.
kernels/cpu/sample.c has the same operations in the same order.
"""

from __future__ import annotations

import torch

LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""ln 2 in two parts; products of the first with whole numbers up to 2^14 are exact."""

SUM_LANES = 1024
"""Partial sums of `log_sum_exp`."""

_LOG2_E = 1.44269504
_SQRT_HALF_BITS = 0x3F3504F3
_EXP_TERMS = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
_LOG_TERMS = (2 / 7, 2 / 5, 2 / 3)
"""Taylor coefficients, as float32, behind the highest."""


def exp_negative(x: torch.Tensor) -> torch.Tensor:
    """exp(x) of x <= 0, float32, to 3e-7 relative; 0 below -87."""
    in_range = x.clamp(min=-87.0)
    n = (in_range * _LOG2_E).round()
    rest = (in_range - n * LN2_HIGH) - n * LN2_LOW
    value = torch.full_like(rest, 1 / 5040)
    for term in _EXP_TERMS:
        value = value * rest + term
    power = ((n.int() + 127) << 23).view(torch.float32)
    return torch.where(x < -87.0, 0.0, value * power)


def log(x: torch.Tensor) -> torch.Tensor:
    """log(x) of x > 0, float32 and normal, to 2e-7 relative: x = 2^e m, m from √½ to √2, f = m - 1, s = f / (2 + f),
    log m = 2 s + 2/3 s³ + 2/5 s⁵ + ...
    """
    bits = x.view(torch.int32) - _SQRT_HALF_BITS
    exponent = (bits >> 23).float()
    f = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).view(torch.float32) - 1
    s = f / (f + 2)
    z = s * s
    series = torch.full_like(z, 2 / 9)
    for term in _LOG_TERMS:
        series = series * z + term
    mantissa = s * (z * series) + (s + s)
    return exponent * LN2_HIGH + (mantissa + exponent * LN2_LOW)


def log_of(x: float) -> float:
    """`log` of one number, which is brought to float32 and to the least normal one."""
    return float(log(torch.tensor([max(x, torch.finfo(torch.float32).tiny)], dtype=torch.float32)))


def log_sum_exp(x: torch.Tensor) -> float:
    """log Σ exp of [V] float32, in one order: SUM_LANES partial sums, element by element, then halves upon halves."""
    largest = x.max()
    masses = torch.nn.functional.pad(exp_negative(x - largest), (0, -len(x) % SUM_LANES))
    sums = torch.zeros(SUM_LANES)
    for part in masses.view(-1, SUM_LANES):
        sums = sums + part
    while len(sums) > 1:
        first, second = sums.chunk(2)
        sums = first + second
    return float(largest + log(sums))
