"""The random draw, as a function of (seed, sample index, position, token id) and nothing else.

A counter-based generator: no state to carry, so the draw of a token does not depend on what else is in the
batch, on preemption or on the device. The host mixes the first three into a key, the device mixes the key
with every token id (two rounds of the 32-bit finalizer of MurmurHash3, Appleby 2011) and turns the result
into Gumbel noise: adding it to the logits and taking the largest draws from the softmax (Gumbel 1954).
"""

from __future__ import annotations

import torch

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
    return _signed32(key & 0xFFFFFFFF), _signed32(key >> 32)


def derive_seed(seed: int, index: int) -> int:
    """The seed of prompt `index` under an engine-wide seed: 63 bits, so that it is a valid request seed."""
    return _splitmix64(_splitmix64(seed & _MASK64) ^ index) >> 1


def gumbel_noise(key: tuple[int, int], token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for each of `token_ids` ([...] integer), float32 of the same shape."""
    # The winner has the smallest exponential: -log1p(-u) is fine-grained there, -log(u) is not.
    exponential = -torch.log1p(-uniform_noise(key, token_ids))
    return -torch.log(exponential)


def uniform_noise(key: tuple[int, int], token_ids: torch.Tensor) -> torch.Tensor:
    """Uniform noise between 2^-33 and 1 - 2^-24 for each of `token_ids` ([...] integer), float32."""
    low, high = key
    bits = _mix32(_mix32(token_ids.to(torch.int32) ^ low) + high)
    uniform = ((bits.to(torch.int64) & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    return uniform.clamp_(max=1.0 - 2.0**-24)


def _mix32(bits: torch.Tensor) -> torch.Tensor:
    # int32 products wrap around; >> is arithmetic, so the copied sign bits are masked off.
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * _signed32(0x85EBCA6B)
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * _signed32(0xC2B2AE35)
    return bits ^ ((bits >> 16) & 0xFFFF)


def _signed32(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value
