"""The random draw, as a function of (seed, sample index, position, token id) and nothing else: its keys.

A counter-based generator: no state to carry, so the draw of a token does not depend on what else is in the
batch, on preemption or on the device. The host mixes the first three into a key, the device mixes the key
with every token id (`engine.kernels.noise`).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator

_MASK64 = 2**64 - 1


def _splitmix64(value: int) -> int:
    """One output of SplitMix64 (Steele, Lea, Flood 2014), a bijection of 64 bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def draw_key(seed: int, index: int, position: int) -> tuple[int, int]:
    """Two signed 32-bit words for a draw: sample `index` of the request with `seed`, token at `position`."""
    key = _splitmix64(seed & _MASK64)
    key = _splitmix64(key ^ index)
    key = _splitmix64(key ^ position)
    return signed32(key & 0xFFFFFFFF), signed32(key >> 32)


def derive_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` under an engine-wide seed: 63 bits, so that it is a valid request seed."""
    return _splitmix64(_splitmix64(seed & _MASK64) ^ index) >> 1


def request_seed(given: int | None, engine_seed: int | None, numbers: Iterator[int]) -> int:
    """The seed of a request: its own, or one under an engine-wide seed, or a random one.

    Args:
        numbers: What tells requests apart under an engine-wide seed; the next is taken where it is needed.
    """
    if given is not None:
        return given
    return secrets.randbits(63) if engine_seed is None else derive_seed(engine_seed, next(numbers))


def signed32(value: int) -> int:
    """The low 32 bits as a signed number."""
    return value - 2**32 if value >= 2**31 else value
